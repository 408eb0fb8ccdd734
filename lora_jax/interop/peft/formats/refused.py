"""The kinds of HF PEFT that are not read: why, and what is to be done about a folder of one."""

from types import MappingProxyType

_PROMPT = "it trains prompts or caches in front of the input, and no change of weights does that: use it in PEFT"
_ROUTED = "which change a token gets depends on the token, and no change of weights does that: use it in PEFT"
_MERGE = "merge it in PEFT, model.merge_and_unload(), and take the merged weights"
_CONVERT = 'save it as LoRA in PEFT, peft.save_as_lora("folder", model, rank=...), and load that'

_TURNS = f"it turns W by an orthogonal matrix, a change of full rank and no LoRA: {_MERGE}"
_DEPENDS = f"its change depends on the numbers in W, and is no LoRA: {_MERGE}"
_SPARSE = f"it changes single entries of W, which is no LoRA: {_MERGE}"
_SPECTRAL = f"its change is given by its spectrum, is of full rank and no LoRA: {_MERGE}"
_SHARED = f"its factors are made of numbers that all modules share: {_CONVERT}"
_FULL_RANK = f"its change is of full rank and no LoRA; the nearest of a rank is found in PEFT: {_CONVERT}"

REFUSED = MappingProxyType(
    {
        **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _PROMPT),
        **dict.fromkeys(("CPT", "CARTRIDGE", "ADAPTION_PROMPT"), _PROMPT),
        **dict.fromkeys(("XLORA", "POLY", "LILY"), _ROUTED),
        "SHADOW": "it is a network beside the model, and no change of weights does what it does: use it in PEFT",
        "PEANUT": f"its change is a neural network's output for W, and no LoRA: {_MERGE}",
        **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD"), _TURNS),
        **dict.fromkeys(("HIRA", "GLORA", "DEFT", "OSF", "FROD", "ADAMSS"), _DEPENDS),
        **dict.fromkeys(("SHIRA", "SUPERTUNING"), _SPARSE),
        **dict.fromkeys(("FOURIERFT", "WAVEFT"), _SPECTRAL),
        **dict.fromkeys(("C3A", "RANDLORA"), _FULL_RANK),
        **dict.fromkeys(("UNILORA", "TINYLORA", "VBLORA", "PSOFT"), _SHARED),
        "PVERA": f"its projections are random numbers that PEFT draws in its own way: {_MERGE}",
        "LN_TUNING": f"it trains norms whole, beside no adapter, and its names are not read: {_MERGE}",
        "BEFT": f"it trains biases alone, beside no adapter, and its names are not read: {_MERGE}",
        "TRAINABLE_TOKENS": (
            "it trains rows of tables beside no adapter; here these stand beside LoRA, as LoraConfig("
            f"trainable_token_indices=...) of PEFT has them: train them so, or {_MERGE}"
        ),
        "BONE": f"it became MiSS with init_weights='bat', whose change depends on W: {_MERGE}, with a PEFT that has it",
    }
)
