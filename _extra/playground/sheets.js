// <latent-sheet>: one picture at a time out of a sheet of them, chosen by a hand, a key or a finger. The element's content is an
// ordinary figure: without scripts, and in print, the reader sees the whole sheet.
//
//   columns, rows   pictures in the sheet; gap: pixels between them
//   mode            "pad" (two directions), "slider" (one row at a time) or "redraw" (pictures and scales by row)
//   zoom            of the picture; without it, as large as fits into 320 pixels
//   pad:    corners, start           what stands there: top left, top right, bottom left, bottom right; column and row
//   slider: label, step, digits      the value of row k is k times step; across: how many pictures stand side by side
//   redraw: pictures, scales         names; a row's first picture is the original, in the others that scale is redrawn
"use strict";
{
const { arrow, button, choice, clamp, element, pointAt } = PlaygroundPage;
const STYLE = `${PlaygroundPage.STYLE}
  :host { --ring: var(--accent); container-type: normal; print-color-adjust: economy; }
  .tools { align-items: center; gap: .75rem 1.5rem; justify-content: center; margin: 0; }
  .view { display: block; image-rendering: pixelated; max-width: 100%; }
  .pad { border: 1px solid var(--border); cursor: crosshair; max-width: 100%; position: relative;
    touch-action: none; user-select: none; width: 19rem; }
  .pad canvas { display: block; width: 100%; }
  .pad i { box-shadow: 0 0 0 2px #fff, 0 0 0 4px #d0006f, 0 0 0 5px #fff; pointer-events: none; position: absolute; }
  .controls { display: grid; flex: 1 1 100%; gap: .25rem; margin-inline: auto; max-width: 36rem; min-width: 0; }
  .row { align-items: center; display: flex; flex-wrap: wrap; gap: .25rem .75rem; justify-content: center; }
  .row label > span { min-width: 7rem; }
  .row label { align-items: center; display: flex; flex: 1; gap: .75rem; min-height: 2.75rem; min-width: 0; }
  input[type="range"] { cursor: pointer; flex: 1; height: 2.75rem; margin: 0; min-width: 6rem; }
  input[type="checkbox"] { height: 1.5rem; width: 1.5rem; }
  fieldset { gap: .4rem; justify-content: center; margin: .25rem 0; }
  legend { font-weight: inherit; line-height: 2.75rem; padding: 0 .5rem 0 0; }
  .options { display: contents; }
  .pill span, .plain { justify-content: center; min-height: 2.75rem; min-width: 2.75rem; }
  :focus-visible, .pill input:focus-visible + span { outline-offset: 3px; }
  output { color: var(--text); display: block; font-variant-numeric: tabular-nums; min-height: 1.4em; text-align: center; }
  @media (max-width: 40rem) { /* both on one screen: the eye is on the picture, the finger on the pad */
    .pad { width: 14rem; }
    .view.beside { max-width: 17rem; }
    legend { float: none; line-height: 1.5; padding: 0; text-align: center; width: 100%; }
    output { min-height: 2.8em; }
  }
`;
// The caption stays; the sheet, which the figure shows without scripts, comes back on paper.
const OUTSIDE = "@media screen { latent-sheet.ready figure > :not(figcaption) { display: none; } }";
const BETWEEN = 4; // screen pixels between pictures that stand side by side

class LatentSheet extends HTMLElement {
  connectedCallback() {
    const figure = this.querySelector("img");
    if (this.shadowRoot || !figure) return;
    this.alt = figure.alt;
    this.sheet = new Image(); // the figure's own may be left unloaded while it is not on the screen
    this.sheet.addEventListener("load", () => this.build());
    this.sheet.src = figure.src;
  }

  number(name, otherwise) {
    return Number(this.getAttribute(name) ?? otherwise);
  }

  list(name) {
    return this.getAttribute(name).split(",").map((part) => part.trim());
  }

  build() {
    if (this.shadowRoot) return;
    [this.columns, this.rows, this.gap] = [this.number("columns"), this.number("rows"), this.number("gap", 0)];
    this.width = (this.sheet.naturalWidth + this.gap) / this.columns - this.gap; // of one picture
    this.height = (this.sheet.naturalHeight + this.gap) / this.rows - this.gap;
    this.view = element("canvas.view", { role: "img", "aria-label": `A part of the sheet, enlarged. ${this.alt}` });
    this.status = element("output");
    this.attachShadow({ mode: "open" }).append(element("style", {}, STYLE), this[this.getAttribute("mode")](), element("slot"));
    this.classList.add("ready");
  }

  // Pictures of the sheet, as [column, row], side by side; several in one place are mixed with their weights.
  show(places, across = 1) {
    const zoom = this.number("zoom", Math.max(1, Math.floor(320 / (across * this.width))));
    const between = across > 1 ? Math.ceil(BETWEEN / zoom) : 0;
    const size = (n, one) => n * one + (n - 1) * between;
    this.view.width = size(across, this.width); // which also clears it
    this.view.height = size(Math.ceil(places.length / across), this.height);
    this.view.style.width = `${zoom * this.view.width}px`;
    const pen = this.view.getContext("2d");
    places.forEach((parts, i) => {
      let sum = 0;
      for (const [column, row, weight = 1] of parts) {
        sum += weight;
        pen.globalAlpha = weight / sum; // what lies there already keeps the rest: in the end each has its weight
        pen.drawImage(
          this.sheet,
          column * (this.width + this.gap), row * (this.height + this.gap), this.width, this.height,
          (i % across) * (this.width + between), Math.floor(i / across) * (this.height + between), this.width, this.height,
        );
      }
    });
  }

  // What is shown, in words. A range input speaks for itself, and a dragging hand needs no voice: then not aloud.
  say(text, aloud) {
    this.status.setAttribute("aria-live", aloud ? "polite" : "off");
    this.status.textContent = text;
  }

  range(label, last, moved) {
    const input = element("input", { type: "range", min: 0, max: last, value: 0, oninput: () => moved(Number(input.value)) });
    return { input, whole: element("label", {}, element("span", {}, label), input) };
  }

  radios(title, names, chosen, changed) {
    const { fieldset, radios } = choice(title, title, names, (i) => changed(Number(i)));
    radios[chosen].checked = true;
    return fieldset;
  }

  // What a mode adds to the page: the picture, perhaps something beside it, and controls.
  part(controls, ...beside) {
    return element("div.tools", {}, this.view, ...beside, element("div.controls", {}, this.status, ...controls));
  }

  // --- the three modes, each gives its part of the page ---

  pad() {
    const last = [this.columns - 1, this.rows - 1];
    const names = this.list("corners");
    let at;
    const mixing = element("input", { type: "checkbox", onchange: () => move(...at) });
    const marker = element("i", { style: `height: ${100 / this.rows}%; width: ${100 / this.columns}%` });
    const map = element("canvas", { width: this.sheet.naturalWidth, height: this.sheet.naturalHeight });
    map.getContext("2d").drawImage(this.sheet, 0, 0);
    const move = (column, row, aloud = false) => {
      at = [clamp(column, 0, last[0]), clamp(row, 0, last[1])];
      const [x, y] = at.map((place, i) => place / last[i]);
      const weights = [(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x];
      const corners = [[0, 0], [last[0], 0], [0, last[1]], last].map((corner, i) => [...corner, weights[i]]);
      this.show([mixing.checked ? corners.filter((corner) => corner[2] > 0) : [at]]);
      marker.style.left = `${(100 * at[0]) / this.columns}%`;
      marker.style.top = `${(100 * at[1]) / this.rows}%`;
      sliders.forEach(({ input }, i) => {
        input.value = at[i];
        input.setAttribute("aria-valuetext", `${Math.round((100 * at[i]) / last[i])} %`);
      });
      const shares = weights.map((weight, i) => [Math.round(100 * weight), names[i]]).filter(([percent]) => percent > 0);
      this.say(shares.map(([percent, name]) => `${name}: ${percent} %`).join(", "), aloud);
    };
    const sliders = [
      this.range("left to right", last[0], (column) => move(column, at[1])),
      this.range("top to bottom", last[1], (row) => move(at[0], row)),
    ];

    const point = (event) => {
      const [right, up] = pointAt(event, map, 1); // from -1 to 1
      move(Math.floor((this.columns * (1 + right)) / 2), Math.floor((this.rows * (1 - up)) / 2));
    };
    const pad = element("div.pad", {
      role: "application", tabindex: 0, "aria-label": "pad: the arrow keys move between the corners",
      onpointerdown: (event) => {
        pad.setPointerCapture(event.pointerId);
        point(event);
      },
      onpointermove: (event) => pad.hasPointerCapture(event.pointerId) && point(event),
      onkeydown: (event) => {
        const step = arrow(event);
        if (!step) return;
        event.preventDefault(); // the page would scroll
        move(at[0] + step[0], at[1] - step[1], true);
      },
    }, map, marker);

    this.view.classList.add("beside");
    move(...(this.getAttribute("start") ?? "0,0").split(",").map(Number));
    const mix = element("label", {}, mixing, "mix the corners' pixels instead");
    const controls = [...sliders.map(({ whole }) => whole), mix].map((whole) => element("div.row", {}, whole));
    return this.part(controls, pad);
  }

  slider() {
    const [label, step, digits] = [this.getAttribute("label"), this.number("step"), this.number("digits", 1)];
    const across = this.number("across");
    const move = (row, aloud = false) => {
      row = clamp(row, 0, this.rows - 1);
      input.value = row;
      this.show(Array.from({ length: this.columns }, (_, column) => [[column, row]]), across);
      const value = (row * step).toFixed(digits);
      input.setAttribute("aria-valuetext", value);
      this.say(`${label} ${value}`, aloud);
    };
    const { input, whole } = this.range(label, this.rows - 1, move);
    const by = (change) => () => move(Number(input.value) + change, true);
    move(this.number("start", 0));
    const lower = button("◀", by(-1), { "aria-label": `lower ${label}` });
    const higher = button("▶", by(1), { "aria-label": `higher ${label}` });
    return this.part([element("div.row", {}, lower, whole, higher)]);
  }

  redraw() {
    const [pictures, scales] = [this.list("pictures"), this.list("scales")];
    const now = { picture: 0, scale: scales.length - 1, draw: 1 };
    const move = (changes) => {
      Object.assign(now, changes);
      const row = now.picture * scales.length + now.scale;
      this.show([[[0, row]], [[now.draw, row]]], 2);
      this.say(`Left: the original. Right: scale ${now.scale + 1} drawn again, ${now.draw} of ${this.columns - 1}.`, true);
    };
    move({});
    const next = button("next draw", () => move({ draw: (now.draw % (this.columns - 1)) + 1 }), { class: "plain main" });
    return this.part([
      this.radios("picture", pictures, now.picture, (picture) => move({ picture })),
      this.radios("scale", scales, now.scale, (scale) => move({ scale })),
      element("div.row", {}, next),
    ]);
  }
}

document.head.append(element("style", {}, OUTSIDE));
const define = () => customElements.define("latent-sheet", LatentSheet); // once the figures in the page are read
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define);
else define();
}
