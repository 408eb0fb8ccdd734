// What a reader would see to be wrong with the page that is open: run in it, returns a list of sentences.
async () => {
  const frame = () => new Promise(requestAnimationFrame);
  await frame(); // the page's own scripts are told of another width or scheme before the next frame is drawn
  await frame();
  const problems = [];
  const width = document.documentElement.clientWidth;
  const content = document.querySelector("main article") ?? document.querySelector("main") ?? document.body;
  document.getAnimations().forEach((animation) => animation.finish()); // colours fade into each other
  const asked = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = document.documentElement.dataset.theme ?? asked;
  if (theme !== asked) problems.push(`it is ${theme}, and ${asked} was asked for`);

  // --- names and visibility

  function name(element) {
    const own = element.id ? "#" + element.id : [...element.classList].slice(0, 2).map((c) => "." + c).join("");
    return element.tagName.toLowerCase() + own;
  }

  function place(element) {
    const names = [];
    for (let e = element; e && e !== document.body && names.length < 4; e = e.parentElement) names.unshift(name(e));
    return names.join(" > ");
  }

  function visible(element) {
    const { width, height } = element.getBoundingClientRect();
    if (width <= 1 || height <= 1) return false; // for screen readers only
    return element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  }

  // --- headings: what a screen reader jumps by

  const headings = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(visible);
  const first = headings.filter((heading) => heading.tagName === "H1").length;
  if (first !== 1) problems.push(`it has ${first} headings h1, not one`);
  const inContent = headings.filter((heading) => content.contains(heading));
  inContent.forEach((heading, i) => {
    const above = i ? Number(inContent[i - 1].tagName[1]) : 0;
    if (Number(heading.tagName[1]) > above + 1) {
      problems.push(`${JSON.stringify(heading.textContent)} is a heading h${heading.tagName[1]} under an h${above}`);
    }
  });

  // --- images

  for (const image of document.images) {
    image.loading = "eager"; // also below the part that is seen
    await image.decode().catch(() => problems.push(`the image ${image.getAttribute("src")} cannot be shown`));
  }

  // --- what is wider than the window, or cut off by what it stands in

  function ancestor(element, test) {
    for (let e = element.parentElement; e && e !== document.body; e = e.parentElement) {
      if (test(e)) return e;
    }
    return null;
  }

  const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);

  if (document.documentElement.scrollWidth > width) {
    problems.push(`the page is ${document.documentElement.scrollWidth} px wide, and the window ${width}`);
  }
  const wide = new Set();
  for (const element of content.querySelectorAll("*")) {
    const left = element.getBoundingClientRect().left;
    const right = Math.max(element.getBoundingClientRect().right, scrolls(element) ? 0 : left + element.scrollWidth);
    if (right <= width + 1 && left >= -1) continue;
    if (wide.has(element.parentElement)) { wide.add(element); continue; } // one sentence for all of it
    if (!visible(element) || ancestor(element, scrolls)) continue;
    if (ancestor(element, (e) => getComputedStyle(e).clip !== "auto" || getComputedStyle(e).clipPath !== "none")) continue;
    wide.add(element);
    problems.push(`${place(element)} reaches from ${Math.round(left)} to ${Math.round(right)} px of ${width}`);
  }

  // --- contrast of text: WCAG 2.2, 1.4.3, level AA

  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const colours = new Map();

  function rgba(colour) { // of any notation: [red, green, blue, alpha], each from 0 to 1
    if (!colours.has(colour)) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = colour;
      pixel.fillRect(0, 0, 1, 1);
      colours.set(colour, [...pixel.getImageData(0, 0, 1, 1).data].map((value) => value / 255));
    }
    return colours.get(colour);
  }

  function over([r, g, b, alpha], below) {
    return [r, g, b].map((value, i) => alpha * value + (1 - alpha) * below[i]);
  }

  const grounds = new Map([[null, [1, 1, 1]]]);

  function ground(element) { // the colour behind the text of `element`, or null where a picture is
    if (!grounds.has(element)) {
      const style = getComputedStyle(element);
      const own = rgba(style.backgroundColor);
      const below = own[3] === 1 ? [0, 0, 0] : ground(element.parentElement);
      grounds.set(element, style.backgroundImage === "none" && below ? over(own, below) : null);
    }
    return grounds.get(element);
  }

  function luminance(colour) {
    const [r, g, b] = colour.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function contrast(one, other) {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }

  const opacities = new Map([[null, 1]]);

  function opacity(element) { // of `element` in all that it stands in
    if (!opacities.has(element)) {
      opacities.set(element, Number(getComputedStyle(element).opacity) * opacity(element.parentElement));
    }
    return opacities.get(element);
  }

  const shown = (colour) => "rgb(" + colour.map((value) => Math.round(value * 255)).join(", ") + ")";
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set(); // one sentence for all text of the same colours in the same kind of element
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const element = text.parentElement;
    if (!text.data.trim() || !visible(element) || element.closest("script, style, noscript, :disabled")) continue;
    const below = ground(element);
    if (!below) continue;
    const style = getComputedStyle(element);
    const [r, g, b, alpha] = rgba(style.color);
    const colour = over([r, g, b, alpha * opacity(element)], below);
    const size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const found = contrast(colour, below);
    const kind = [element.tagName, element.className, shown(colour), shown(below)].join();
    if (found >= needed || seen.has(kind)) continue;
    seen.add(kind);
    problems.push(
      `contrast ${found.toFixed(2)}, not ${needed}: ${shown(colour)} on ${shown(below)}, ` +
      `${JSON.stringify(text.data.trim().slice(0, 40))} in ${place(element)}`
    );
  }
  return problems;
}
