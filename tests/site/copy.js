// Press the button of every block of code of the page that is open: returns what each shows and what was copied, or null.
async () => {
  const blocks = [];
  for (const shown of document.querySelectorAll("div.highlight pre")) {
    const box = shown.closest("[class*='highlight-']");
    const language = /highlight-(\S+)/.exec(box?.className ?? "")?.[1] ?? "";
    const button = shown.closest("div.highlight").querySelector("button.copybtn");
    let copied = null;
    if (button) {
      await navigator.clipboard.writeText("what was copied before");
      button.click();
      copied = await navigator.clipboard.readText();
    }
    blocks.push({ language, shown: shown.textContent, copied });
  }
  return blocks;
}
