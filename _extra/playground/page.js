// What the elements of the playground share: the style, the parts of a page, numbers as text, and addresses.
// Each of these files is one block, which is not indented: the names of classic scripts would meet on the page.
"use strict";
{
const STYLE = `
  :host { --text: var(--pst-color-text-base, #222832); --muted: var(--pst-color-text-muted, #48566b);
    --ground: var(--pst-color-background, #fff); --surface: var(--pst-color-surface, #f3f4f5);
    --border: var(--pst-color-border, #c9c9c9); --accent: var(--pst-color-primary, #0a7d91);
    --bad: var(--pst-color-danger, #b4233a); --ring: var(--pst-color-link, #0a7d91);
    accent-color: var(--accent); color: var(--text); container-type: inline-size; display: block; font-size: 1rem; line-height: 1.4;
    margin-block: 1.5rem; scroll-margin-top: 4rem; }
  * { box-sizing: border-box; }
  fieldset, .options, .way, .tools { display: flex; flex-wrap: wrap; gap: .25rem; }
  fieldset { border: 0; margin: 0; min-width: 0; padding: 0; }
  legend { float: left; font-weight: 600; padding: 0; }
  .choices { display: grid; gap: .5rem .75rem; grid-template-columns: max-content 1fr; margin-bottom: .75rem; }
  .choices fieldset { display: contents; }
  .choices legend { align-self: center; }
  .pill, .plain { cursor: pointer; position: relative; }
  .pill input { cursor: pointer; height: 100%; inset: 0; margin: 0; opacity: 0; position: absolute; width: 100%; }
  .pill span, .plain { align-items: center; background: var(--surface); border: 1px solid var(--border);
    border-radius: 1.25rem; color: var(--text); display: inline-flex; font: inherit; min-height: 2.5rem; padding: .3rem .8rem; }
  .pill input:checked + span, .plain[aria-pressed="true"], .main {
    background: var(--accent); border-color: var(--accent); color: var(--ground); }
  .broken input:checked:not([value="nothing"]) + span { background: var(--bad); border-color: var(--bad); }
  :focus-visible, .pill input:focus-visible + span { outline: 3px solid var(--ring); outline-offset: 2px; }
  select, input[type="number"] { background: var(--ground); border: 1px solid var(--muted); border-radius: .3rem; color: var(--text);
    font-family: inherit; padding: .1rem .3rem; }
  .way { align-items: center; gap: .35rem; margin: .5rem 0 .25rem; }
  .now { margin: .5rem 0; min-height: 1.4em; }
  .panes { display: grid; gap: .5rem 1rem; grid-template-columns: minmax(0, 40svh); justify-content: center; }
  @container (min-width: 34rem) { .panes { grid-template-columns: 1fr 1fr; } }
  .title { font-weight: 600; margin: 0 0 .25rem; }
  .pane { aspect-ratio: 1; background: var(--ground); border: 1px solid var(--border); border-radius: .4rem;
    overflow: hidden; position: relative; }
  .pane canvas { display: block; height: 100%; width: 100%; }
  .story { border-left: 4px solid var(--accent); margin: .75rem 0; padding: .1rem 0 .1rem .75rem; }
  .story.broken { border-color: var(--bad); }
  .tools { gap: .35rem; margin-top: .5rem; }
  .hidden { clip-path: inset(50%); height: 1px; overflow: hidden; position: absolute; white-space: nowrap; width: 1px; }
  .error { color: var(--bad); margin: .35rem 0; }
  .error:empty { display: none; }
  @media (forced-colors: active) {
    .pill input:checked + span, .plain[aria-pressed="true"] {
      background: Highlight; color: HighlightText; forced-color-adjust: none; }
  }
  @media print {
    :host { print-color-adjust: exact; }
    .tools { display: none; }
  }
`;

// --- parts of a page ---

// The tag may name classes: "p.story.broken". An attribute that is a function, such as onclick, is called at that event.
function element(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function button(text, onclick, attributes = {}) {
  return element("button.plain", { type: "button", onclick, ...attributes }, text);
}

function pill(input, text) {
  return element("label.pill", {}, input, element("span", {}, text));
}

// A choice between options, which are texts by value: the fieldset, and the radio button of each value.
function choice(title, name, options, onChange) {
  const radios = {};
  const pills = Object.entries(options).map(([value, text]) => {
    radios[value] = element("input", { type: "radio", name, value, onchange: () => onChange(value) });
    return pill(radios[value], text);
  });
  return { fieldset: element("fieldset", {}, element("legend", {}, title), element("div.options", {}, ...pills)), radios };
}

function opener(open) {
  const onchange = () => {
    if (input.files.length) open(input.files[0]);
    input.value = ""; // so that the same file can be opened again
  };
  const input = element("input", { type: "file", accept: ".json,application/json", "aria-label": "open a flow", onchange });
  return element("label.pill", {}, input, element("span", { "aria-hidden": "true" }, "open a flow…"));
}

// Where an arrow key leads, as steps to the right and up; null for another key.
function arrow({ key, ctrlKey, altKey, metaKey }) {
  if (ctrlKey || altKey || metaKey) return null;
  return { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key] ?? null;
}

// The point of the plane under the pointer, in a square pane from -extent to extent.
function pointAt(event, canvas, extent) {
  const { left, top, width, height } = canvas.getBoundingClientRect();
  return [extent * ((2 * (event.clientX - left)) / width - 1), extent * (1 - (2 * (event.clientY - top)) / height)];
}

// Call draw when the target's size or the page's theme changes, and once at first.
function followLooks(target, draw, signal) {
  const [size, theme] = [new ResizeObserver(() => draw()), new MutationObserver(() => draw())];
  size.observe(target);
  theme.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  signal.addEventListener("abort", () => [size, theme].forEach((one) => one.disconnect()));
}

// --- numbers and colours ---

function number(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "no number" : value > 0 ? "∞" : "−∞";
  if (Math.abs(value) >= 1e6) return minus(value.toExponential(2));
  return minus(value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 }));
}

function signed(value) {
  return value < 0 ? number(value).replace("−", "− ") : `+ ${number(value)}`;
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

function minus(value) {
  return String(value).replace("-", "−");
}

function pair(h) {
  return `(${h.map(number).join(", ")})`;
}

// A point's colour is where it is in the data: the angle gives the hue, the distance the lightness.
function hue([x1, x2]) {
  return `hsl(${(Math.atan2(x2, x1) * 180) / Math.PI} 75% ${Math.min(35 + 8 * Math.hypot(x1, x2), 58)}%)`;
}

// --- pictures ---

// A canvas as sharp as the screen: its pen, its size, the page's colours, and the pixels of a point in a square pane from -extent
// to extent. Null where the canvas has no width.
function startDrawing(canvas, extent) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return null;
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const toPixels = ([h1, h2]) => [(width / 2) * (1 + h1 / extent), (width / 2) * (1 - h2 / extent)];
  return { pen, width, height, colour, toPixels };
}

function dot(pen, [left, top], radius) {
  pen.beginPath();
  pen.arc(left, top, radius, 0, 2 * Math.PI);
  pen.fill();
}

// The axes of a square pane, from -extent to extent.
function drawAxes({ pen, width: size, colour }, extent, letter) {
  const every = extent > 6 ? 4 : extent > 4 ? 2 : 1;
  pen.fillStyle = colour("text");
  pen.font = "11px sans-serif";
  for (let tick = -every * Math.floor(extent / every); tick <= extent; tick += every) {
    const where = (size / 2) * (1 + tick / extent);
    if (where < 24 || where > size - 24) continue; // the corners are for the axes' names
    pen.fillRect(where, size - 4, 1, 4);
    pen.fillRect(0, size - where, 4, 1);
    pen.textAlign = "center";
    pen.fillText(minus(tick), where, size - 7);
    pen.textAlign = "left";
    pen.fillText(minus(tick), 7, size - where + 4);
  }
  pen.font = "italic 600 13px sans-serif";
  pen.fillText(`${letter}₂`, 7, 16);
  pen.textAlign = "right";
  pen.fillText(`${letter}₁`, size - 6, size - 8);
}

// The number that a share of the finite values is below.
function quantile(values, share) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  return sorted[Math.floor(share * sorted.length)];
}

// A density on side times side cells, row by row from the top, as a picture: the denser, the darker; hatched where it is no finite
// number. Thin ridges are far denser than the rest: the darkest colour begins at what 1 in 100 cells exceeds, if nothing else is given.
function densityPicture(density, side, colour, darkest = quantile(density, 0.99)) {
  const picture = element("canvas", { width: side, height: side });
  const pen = picture.getContext("2d");
  pen.fillStyle = colour("accent");
  pen.fillRect(0, 0, side, side);
  const pixels = pen.getImageData(0, 0, side, side);
  density.forEach((p, i) => {
    pixels.data[4 * i + 3] = Number.isFinite(p) ? 190 * Math.sqrt(Math.min(p / (darkest || 1), 1)) : 0;
  });
  pen.putImageData(pixels, 0, 0);
  pen.fillStyle = colour("bad");
  pen.globalAlpha = 0.5;
  density.forEach((p, i) => {
    const [column, row] = [i % side, Math.floor(i / side)];
    if (!Number.isFinite(p) && (column + row) % 6 < 2) pen.fillRect(column, row, 1, 1);
  });
  return picture;
}

// --- addresses ---

// What an address such as #data=moons&layer=3&in=second says, if it is the host's: the key (data) stands for the kind of element,
// "in" for its id, if it has one. Else null.
function readAddress(host, key) {
  const params = new URLSearchParams(location.hash.slice(1));
  return params.has(key) && (params.get("in") ?? "") === host.id ? params : null;
}

// The state becomes the address. Without a state (null) the host's address goes, but that of another element stays.
function writeAddress(host, key, state) {
  const params = new URLSearchParams(state ?? "");
  if (state && host.id) params.set("in", host.id);
  if (state || readAddress(host, key)) history.replaceState(null, "", `#${params}`);
}

// Call go when the reader goes to an address of the host.
function followAddress(host, key, go, signal) {
  const follow = () => readAddress(host, key) && go();
  addEventListener("hashchange", follow, { signal });
  // A link to the present address does not change it, but the reader wants to go there.
  document.addEventListener("click", (event) => event.target.closest("a")?.href === location.href && follow(), { signal });
}

// The one name that this file adds to the page.
globalThis.PlaygroundPage = {
  STYLE, element, button, pill, choice, opener, arrow, pointAt, followLooks, number, signed, clamp, minus, pair, hue,
  startDrawing, dot, drawAxes, densityPicture, quantile, readAddress, writeAddress, followAddress,
};
}
