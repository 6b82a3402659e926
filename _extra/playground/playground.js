// <flow-playground>: two panes, data and latent, and the layers between them, for a reader to play with. The flows are in
// flows.js (written by tools/playground.py), their mathematics in flow.js. Without scripts the reader sees the element's content.
"use strict";
{
const {
  element, button, choice, opener, arrow, pointAt, followLooks, number, signed, clamp, pair, hue,
  startDrawing, dot, drawAxes, densityPicture, quantile, readAddress, writeAddress, followAddress,
} = PlaygroundPage;
const SETS = globalThis.playgroundSets;
const MODELS = { nice: "NICE", realnvp: "RealNVP" };
const FAILURES = { nothing: "nothing", scaling: "scaling", alternation: "alternation", tanh: "tanh" };
const FIRST = {
  data: "moons", model: "realnvp", without: "nothing", layer: Infinity, x: null,
  points: true, grid: true, density: true, gridOn: "data", pen: false,
};
const GRID = { reach: 3, squares: 12, pieces: 24 }; // from -reach to reach, so many squares each way; pieces of a line
const FINE = 0.03; // of half a pane: pieces of a line that are longer, in any layer, are halved
const HALVINGS = 9; // at most
const CLOSE = 16; // pixels between the ends of what the pen drew that make it a closed line
const HEAT = 108; // pixels across a picture of the density
const EXTENT = 3.4; // half the width of a pane, in units of the data; wider where a layer spreads the points
const WIDEST = 12;
const STEP = 0.1; // of an arrow key
const TWEEN = 350; // milliseconds from one layer to the next

const STORIES = {
  nice: {
    nothing: "Each coupling shears the plane: it slides points along one axis, by an amount that depends on the other coordinate. Shears keep areas. Only the last layer, the scaling, changes areas, by the same factor everywhere.",
    scaling: "Without the scaling layer nothing can change an area: the log-det is 0 wherever you drag the point. The cloud of points keeps the area that it has, which is not the Gaussian's.",
    alternation: "Every coupling has the same mask: x₁ decides and x₂ moves, in all couplings. Before the scaling the path only goes up and down, and the latent's first coordinate is x₁ itself, scaled.",
  },
  realnvp: {
    nothing: "Each coupling slides and stretches points along one axis, by amounts that depend on the other coordinate. Areas change from place to place, and the log-det changes with them: compare it in the middle of the data and outside of them.",
    alternation: "Every coupling has the same mask. Each one slides and stretches x₂ as x₁ says, but x₁ itself comes out as it went in, whatever its distribution.",
    tanh: "The log-scale is what the network says, without g tanh(·) around it. Drag the point away from the data: one layer's exponential feeds the next, and soon z and log p are no finite numbers any more (the hatched area).",
  },
};
// What is peculiar to one flow.
const REMARKS = {
  "circles nice nothing": "On the circles NICE finds no more than one Gaussian.",
  "spiral nice nothing": "On the spiral NICE does better than this RealNVP: how training went matters, too.",
  "curve realnvp alternation": "On the thin curve the fixed mask costs next to nothing: x₁ has a normal distribution already.",
};

const STYLE = `${PlaygroundPage.STYLE}
  .pane canvas { cursor: crosshair; touch-action: pan-y; }
  .drawing canvas { cursor: cell; touch-action: none; }
  .handle { border-radius: 50%; cursor: grab; height: 44px; margin: -22px; position: absolute; touch-action: none; width: 44px; }
  .handle::before { background: var(--bad); border: 3px solid var(--ground); border-radius: 50%;
    box-shadow: 0 0 0 1.5px var(--text); content: ""; height: 18px; inset: 0; margin: auto; position: absolute; width: 18px; }
  .handle.outside::before { border-radius: 0; transform: rotate(45deg); }
  .handle:focus-visible { outline-offset: -8px; }
  .way { margin-top: .75rem; }
  .way input { flex: 1; min-height: 2.5rem; min-width: 3.5rem; }
  .now { min-height: 2.8em; }
  .bars { border-block: 1px solid var(--border); display: flex; gap: 2px; height: 5.5rem; margin: .25rem 0; }
  .bars span { border-radius: .2rem; cursor: pointer; flex: 1; overflow: hidden; position: relative; }
  .bars span.here { background: var(--surface); }
  .bars i { background: var(--accent); left: 15%; position: absolute; right: 15%; }
  .bars i.down { background: var(--bad); }
  .bars span::after { background: var(--border); content: ""; height: 1px; inset: 50% 0 auto; position: absolute; }
  .numbers { display: grid; gap: .5rem 1.5rem; }
  @container (min-width: 34rem) { .numbers { grid-template-columns: 1fr 1fr; } }
  .point { align-items: center; display: flex; gap: .35rem; margin-bottom: .35rem; }
  .point b { flex: none; width: 4.5rem; }
  .point input { flex: 1; font-size: inherit; max-width: 7rem; min-height: 2.5rem; min-width: 4rem; }
  .sum { font-variant-numeric: tabular-nums; margin: .25rem 0; white-space: pre-line; }
  @media (forced-colors: active) {
    .bars i, .handle::before { background: Highlight; forced-color-adjust: none; }
  }
  @media print { .way { display: none; } }
`;

class FlowPlayground extends HTMLElement {
  connectedCallback() {
    if (!this.shadowRoot) this.begin();
    this.leaving = new AbortController();
    const { signal } = this.leaving;
    followLooks(this.panes.data.canvas, () => this.draw(), signal);
    followAddress(this, "data", () => this.goToAddress(), signal);
  }

  disconnectedCallback() {
    this.leaving.abort();
    this.drag = null;
    this.stop();
    this.settle();
  }

  begin() {
    this.attachShadow({ mode: "open" });
    this.state = { ...FIRST };
    this.strokes = []; // what the reader drew, each stroke as points of the data
    // What the pointer does until it is lifted: its pane, its stroke (null: it moves the point), whether it waits, and where
    // the point was before, should a finger turn out to scroll.
    this.drag = null;
    this.drawn = null; // samples instead of the data
    this.opened = null; // a flow of the reader's own instead of ours: its name and its JSON
    this.shown = 0; // the layer that is on the screen: on its way to state.layer
    this.build();
    if (!this.goToAddress()) this.choose();
  }

  // --- what is chosen ---

  // An address such as #data=moons&model=nice&without=scaling&layer=3 says everything: what the reader had drawn, opened or
  // switched on is put away. False if it says nothing.
  goToAddress() {
    const wanted = readAddress(this, "data");
    if (!wanted || !Object.hasOwn(SETS, wanted.get("data"))) return false;
    this.stop();
    Object.assign(this.state, FIRST, {
      data: wanted.get("data"),
      model: Object.hasOwn(MODELS, wanted.get("model")) ? wanted.get("model") : FIRST.model,
      without: wanted.get("without"),
      layer: Math.max(0, Math.round(Number(wanted.get("layer")) || 0)),
      gridOn: wanted.get("grid") === "latent" ? "latent" : "data",
      pen: wanted.has("pen"),
    });
    this.strokes = [];
    this.opened = null;
    this.drawn = wanted.has("samples") ? [] : null;
    this.choose();
    this.scrollIntoView();
    return true;
  }

  // A flow of the reader's own has no address: any would name one of ours.
  writeAddress() {
    const { data, model, without, layer, gridOn: grid } = this.state;
    writeAddress(this, "data", this.opened ? null : { data, model, without, layer, grid });
  }

  // Read the chosen flow, and everything that depends on it.
  choose() {
    const { state } = this;
    this.drag = null; // a stroke that is being drawn ends
    const set = SETS[state.data];
    const flows = set.flows[state.model];
    if (!Object.hasOwn(flows, state.without)) state.without = "nothing";
    this.flow = new PlaygroundFlow(this.opened?.json ?? flows[state.without]);
    this.last = this.flow.layers.length;
    state.layer = Math.min(state.layer, this.last);
    cancelAnimationFrame(this.frame); // it comes from a layer that this flow may not have
    this.shown = state.layer;
    this.slider.max = this.last;
    const numbers = PlaygroundFlow.decodeHalves(set.points);
    this.setPoints = Array.from({ length: numbers.length / 2 }, (_, i) => [numbers[2 * i], numbers[2 * i + 1]]);
    if (this.drawn || this.opened) this.drawn = this.samples();
    const paths = this.follow();
    state.x ??= this.firstPoint();
    this.layGrid();
    this.heats = [];
    for (const [name, radios] of Object.entries(this.radios)) {
      for (const [value, radio] of Object.entries(radios)) {
        radio.checked = state[name] === value && !this.opened;
        if (name === "without") radio.parentElement.hidden = !Object.hasOwn(flows, value);
      }
    }
    this.showSwitches();
    this.error.textContent = "";
    const broken = state.without !== "nothing" && !this.opened;
    this.story.className = broken ? "story broken" : "story";
    this.story.textContent = this.opened ? `${this.opened.name}. The points are samples from it.` : this.tell(flows);
    // The bars keep their scale while the point moves: what the layers add at the points that are shown.
    const added = paths.flatMap(({ logDets }) => logDets.map(Math.abs)).filter(Number.isFinite);
    this.barScale = Math.max(0.5, ...added);
    this.moveTo(this.flow.path(state.x));
  }

  // One of the points that are shown, whose whole way can be seen.
  firstPoint() {
    const seen = (states) => states.every((h, k) => h.every((v) => Math.abs(v) < 0.9 * this.extents[k]));
    return (this.points.find(seen) ?? this.points[0])?.[0] ?? [0, 0]; // a flow that was opened may have no finite samples
  }

  tell(flows) {
    const { data, model, without } = this.state;
    const [flow, whole] = [flows[without], flows.nothing];
    const compared = flow === whole ? "" : `; with nothing left out it is ${number(whole.log_prob)}`;
    return [
      STORIES[model][without],
      REMARKS[`${data} ${model} ${without}`],
      `Its log p is ${number(flow.log_prob)} nats on average over new points${compared}.`,
      flow.lr < whole.lr && `At the learning rate of the other flows, ${whole.lr}, its loss did not stay finite; this flow was trained at ${flow.lr}.`,
    ].filter(Boolean).join(" ");
  }

  // Show the flow of a file. One that cannot be read changes nothing.
  async open(file) {
    const opened = await PlaygroundFlow.read(file, "shown", this.error);
    if (!opened) return;
    this.opened = opened;
    this.stop();
    this.state.x = null;
    this.choose();
    this.writeAddress();
  }

  // Where the points and the strokes are after every layer; gives the points' paths.
  follow() {
    const paths = this.flow.paths(this.drawn ?? this.setPoints);
    this.points = paths.map(({ states }) => states);
    this.extents = Array.from({ length: this.last + 1 }, (_, k) => {
      const sizes = this.points.map((states) => Math.max(...states[k].map(Math.abs)));
      return clamp(1.1 * (quantile(sizes, 0.99) ?? 0), EXTENT, WIDEST);
    });
    this.lines = this.strokes.map((stroke) => this.line(stroke, 0));
    return paths;
  }

  // A line through points after k layers, straight between them there, as states after every layer: so many that it looks smooth in
  // all of them.
  line(points, k) {
    const statesOf = (vectors) => this.flow.paths(vectors, k).map(({ states }) => states);
    let line = statesOf(points);
    for (let halving = 0; halving < HALVINGS; halving++) {
      const ends = line.flatMap((state, i) => (i && this.far(line[i - 1], state) ? [i] : []));
      if (!ends.length) break;
      const middles = statesOf(ends.map((i) => [0, 1].map((j) => (line[i - 1][k][j] + line[i][k][j]) / 2)));
      line = line.flatMap((state, i) => (i === ends[0] ? (ends.shift(), [middles.shift(), state]) : [state]));
    }
    return line;
  }

  // Whether two neighbours on a line are far apart in a layer in which one of them can be seen.
  far(a, b) {
    return this.extents.some((extent, i) => {
      const visible = [a[i], b[i]].some((h) => h.every((v) => Math.abs(v) < 1.2 * extent));
      return visible && !(Math.hypot(a[i][0] - b[i][0], a[i][1] - b[i][1]) < FINE * extent);
    });
  }

  // The grid, straight in the data or in the latent.
  layGrid() {
    const k = this.state.gridOn === "data" ? 0 : this.last;
    const places = (n) => Array.from({ length: n + 1 }, (_, i) => GRID.reach * ((2 * i) / n - 1));
    const up = places(GRID.squares).map((a) => places(GRID.pieces).map((b) => [a, b]));
    const across = up.map((line) => line.map(([a, b]) => [b, a]));
    this.grid = [...across, ...up].map((points) => this.line(points, k));
  }

  samples() {
    const drawn = this.flow.paths(this.setPoints.map(() => this.flow.drawLatent()), this.last).map(({ states }) => states[0]);
    return drawn.filter((x) => x.every(Number.isFinite));
  }

  // --- the point ---

  moveTo(path) {
    this.path = path;
    if (path.states[0].every(Number.isFinite)) this.state.x = path.states[0];
    this.report();
    this.draw();
  }

  // How many layers the points of a pane have passed.
  passed(pane) {
    return pane === "data" ? 0 : this.state.layer;
  }

  place(pane, h) {
    this.moveTo(this.flow.path(h, this.passed(pane)));
  }

  // --- the page ---

  build() {
    this.radios = {};
    this.switches = []; // buttons, each with what it says
    const titles = Object.fromEntries(Object.entries(SETS).map(([name, set]) => [name, set.title]));
    this.shadowRoot.append(
      element("style", {}, STYLE),
      element("div.choices", {},
        this.radioGroup("Data", "data", titles),
        this.radioGroup("Model", "model", MODELS),
        this.radioGroup("Left out", "without", FAILURES)),
      this.way(),
      element("div.panes", {}, this.pane("data"), this.pane("latent")),
      (this.now = element("p.now")),
      (this.story = element("p.story")),
      element("div.numbers", {},
        element("div", {}, this.pointInputs("data", "x"), this.pointInputs("latent", "z"), (this.sum = element("p.sum"))),
        element("div", {},
          element("p.sum", {}, "What each layer adds to log p, in nats:"),
          (this.bars = element("div.bars", { "aria-hidden": "true" })))),
      this.tools(),
      (this.error = element("p.error", { role: "alert" })),
      (this.spoken = element("p.hidden", { role: "status" })));
  }

  radioGroup(title, name, options) {
    const { fieldset, radios } = choice(title, name, options, (value) => {
      this.stop();
      this.state[name] = value;
      if (name === "data" || this.opened) this.state.x = null; // the point begins as one of those that are shown
      if (this.opened) this.opened = this.drawn = null;
      this.choose();
      this.writeAddress();
      this.say(this.story.textContent);
    });
    this.radios[name] = radios;
    if (name === "without") fieldset.classList.add("broken");
    return fieldset;
  }

  pane(name) {
    const move = (event) => {
      const h = pointAt(event, canvas, this.extent(name));
      if (this.drag.stroke === null) return this.place(name, h);
      this.extend(this.drag.stroke, h, this.passed(name));
      this.draw();
    };
    const ours = (event) => this.drag?.frame === frame && frame.hasPointerCapture(event.pointerId);
    const canvas = element("canvas", { role: "img" });
    // An application, as for a screen reader a button would keep the arrow keys to itself.
    const handle = element("div.handle", {
      role: "application", tabindex: 0,
      onkeydown: (event) => {
        const step = stepOf(event);
        if (!step) return;
        event.preventDefault();
        const h = name === "data" ? this.state.x : this.path.states[this.state.layer];
        if (h.every(Number.isFinite)) this.place(name, h.map((v, i) => v + step[i]));
      },
    });
    const frame = element("div.pane", {
      onpointerdown: (event) => {
        if (event.button !== 0 || !event.isPrimary) return;
        this.settle();
        const { pen, x } = this.state;
        // A finger next to the handle may want to scroll up or down: until it moves sideways, or is lifted, nothing happens.
        const waits = event.pointerType === "touch" && event.target === canvas && !pen;
        this.drag = { frame, stroke: pen ? this.startStroke() : null, waits, before: x };
        frame.setPointerCapture(event.pointerId);
        if (waits) return;
        event.preventDefault();
        if (!pen) handle.focus({ preventScroll: true, focusVisible: false });
        move(event);
      },
      onpointermove: (event) => ours(event) && move(event),
      onpointercancel: (event) => {
        if (!ours(event)) return; // a second finger had no part in it
        if (this.drag.stroke === null) this.moveTo(this.flow.path(this.drag.before));
        this.drag = null;
      },
      onpointerup: (event) => {
        if (!ours(event)) return;
        const { stroke, waits } = this.drag;
        if (waits) move(event);
        if (stroke !== null) this.close(stroke, this.passed(name), (CLOSE / canvas.clientWidth) * 2 * this.extent(name));
        this.drag = null;
      },
    }, canvas, handle);
    const title = element("p.title", {}, "data x");
    this.panes = { ...this.panes, [name]: { canvas, handle, title, frame } };
    return element("div", {}, title, frame);
  }

  // --- the pen ---

  startStroke() {
    this.lines.push([]);
    return this.strokes.push([]) - 1;
  }

  // The stroke goes on to h, straight in the plane after k layers.
  extend(stroke, h, k) {
    const line = this.lines[stroke];
    const added = line.length ? this.line([line.at(-1)[k], h], k).slice(1) : this.line([h], k);
    line.push(...added);
    this.strokes[stroke].push(...added.map((states) => states[0]));
  }

  // A line whose ends nearly meet was meant to be closed.
  close(stroke, k, near) {
    const line = this.lines[stroke];
    const [a, b] = [line[0][k], line.at(-1)[k]];
    if (line.length > 2 && Math.hypot(a[0] - b[0], a[1] - b[1]) < near) this.extend(stroke, a, k);
    this.draw();
  }

  // --- the controls ---

  way() {
    const oninput = () => this.jump(Number(this.slider.value));
    this.slider = element("input", { type: "range", min: 0, value: 0, step: 1, "aria-label": "layers passed", oninput });
    this.player = button("Play", () => (this.playing ? this.stop() : this.play(1)));
    return element("div.way", {},
      this.player,
      button("Sample", () => this.sample(), { title: "draw new points from the Gaussian and send them back through the layers" }),
      button("◀", () => this.jump(this.state.layer - 1), { "aria-label": "one layer back" }),
      this.slider,
      button("▶", () => this.jump(this.state.layer + 1), { "aria-label": "one layer on" }));
  }

  pointInputs(pane, letter) {
    const end = () => (pane === "data" ? 0 : this.last);
    const inputs = ["₁", "₂"].map((index) => {
      const input = element("input", {
        type: "number", step: "any", "aria-label": letter + index,
        onkeydown: (event) => {
          const up = stepOf(event)?.[1];
          if (!up) return;
          event.preventDefault();
          input.value = Number((input.valueAsNumber + up).toFixed(4));
          input.dispatchEvent(new Event("input"));
        },
        oninput: () => {
          const h = inputs.map((one) => one.valueAsNumber);
          if (h.every(Number.isFinite)) this.moveTo(this.flow.path(h, end()));
        },
        onblur: () => this.fill(pane, this.path.states[end()]),
      });
      return input;
    });
    this.panes[pane].inputs = inputs;
    return element("div.point", {}, element("b", {}, `${pane} ${letter}`), ...inputs);
  }

  tools() {
    const { state } = this;
    const toggle = (text, read, write) => {
      const one = button(text, () => {
        write(!read());
        this.showSwitches();
        this.draw();
      });
      this.switches.push([one, read]);
      return one;
    };
    const toggleState = (name) => toggle(name, () => state[name], (on) => (state[name] = on));
    return element("div.tools", {},
      toggleState("points"),
      toggleState("grid"),
      toggleState("density"),
      toggle("grid straight in the latent", () => state.gridOn === "latent", (on) => {
        state.gridOn = on ? "latent" : "data";
        this.layGrid();
        this.writeAddress();
      }),
      toggle("samples instead of data", () => this.drawn !== null, (on) => {
        this.drawn = on || this.opened ? this.samples() : null; // there are no data to a flow that was opened
        this.follow();
      }),
      toggleState("pen"),
      button("wipe", () => {
        this.drag = null;
        this.strokes = [];
        this.follow();
        this.draw();
      }),
      opener((file) => this.open(file)));
  }

  showSwitches() {
    for (const [one, read] of this.switches) one.setAttribute("aria-pressed", read());
    for (const { frame } of Object.values(this.panes)) frame.classList.toggle("drawing", this.state.pen);
  }

  // --- from layer to layer ---

  jump(layer) {
    this.stop();
    this.goTo(layer);
  }

  goTo(layer) {
    this.state.layer = clamp(layer, 0, this.last);
    this.report();
    this.writeAddress();
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return this.settle();
    const from = this.shown;
    const began = performance.now();
    cancelAnimationFrame(this.frame);
    const tick = (time) => {
      const part = clamp((time - began) / TWEEN, 0, 1);
      this.shown = from + (this.state.layer - from) * part;
      this.draw();
      if (part < 1) this.frame = requestAnimationFrame(tick);
    };
    this.frame = requestAnimationFrame(tick);
  }

  // Be where the slider says, at once.
  settle() {
    cancelAnimationFrame(this.frame);
    this.shown = this.state.layer;
    this.draw();
  }

  // Layer by layer to the latent, or with -1 to the data; from the other end if it is there already.
  play(direction) {
    this.stop();
    const [start, end] = direction > 0 ? [0, this.last] : [this.last, 0];
    this.goTo(this.state.layer === end ? start : this.state.layer + direction);
    this.player.textContent = "Stop";
    this.playing = setInterval(() => {
      if (this.state.layer === end) this.stop();
      else this.goTo(this.state.layer + direction);
    }, 3 * TWEEN);
  }

  // From noise to data: new draws, and back through the layers.
  sample() {
    this.stop();
    this.drawn = this.samples();
    this.state.layer = this.last;
    this.follow();
    this.showSwitches();
    this.settle();
    this.play(-1);
  }

  stop() {
    clearInterval(this.playing);
    if (this.playing) this.say(this.position());
    this.playing = null;
    this.player.textContent = "Play";
  }

  // --- words and numbers ---

  report() {
    const { state, path, last } = this;
    const layer = this.flow.layers[state.layer - 1];
    this.slider.value = state.layer;
    this.slider.setAttribute("aria-valuetext", `${state.layer} of ${last}`);
    this.panes.latent.title.textContent =
      state.layer === 0 ? "before the first layer: still x" : state.layer === last ? `after all ${last} layers: latent z` : `after layer ${state.layer} of ${last}: h`;
    this.now.textContent = layer
      ? `Layer ${state.layer}, ${describe(layer)} ${effect(path.logDets[state.layer - 1])}`
      : "Press Play, or move the slider, to send the plane through the layers.";
    this.sum.textContent = `log p(x) = log p(z) + log-det\n${number(path.logProb)} nats = ${number(path.logBase)} ${signed(path.logDet)}`;
    this.fill("data", path.states[0]);
    this.fill("latent", path.states[last]);
    this.bars.replaceChildren(
      ...path.logDets.map((value, i) => {
        const half = Number.isFinite(value) ? (50 * Math.abs(value)) / this.barScale : 50;
        const [way, from] = value < 0 ? ["down", "top"] : ["up", "bottom"];
        const bar = element(`i.${way}`, { style: `height: ${half}%; ${from}: 50%` });
        return element(i === state.layer - 1 ? "span.here" : "span", { onclick: () => this.jump(i + 1) }, bar);
      }),
    );

    const [x, h] = [path.states[0], path.states[state.layer]].map(pair);
    const drawn = `${this.drawn ? "samples" : "points"}, density and grid`;
    this.panes.data.handle.setAttribute("aria-label", `point in the data at ${x}; arrow keys move it`);
    this.panes.latent.handle.setAttribute("aria-label", `its image after ${state.layer} layers at ${h}; arrow keys move it`);
    this.panes.data.canvas.setAttribute("aria-label", `The data's plane: ${drawn}.`);
    this.panes.latent.canvas.setAttribute("aria-label", `The same after ${state.layer} of ${last} layers: ${drawn}, and the point's path.`);
    if (this.reported && !this.playing) this.say(this.position());
    this.reported = true; // a page that has just been opened says nothing unasked
  }

  position() {
    const { states, logProb, logDet } = this.path;
    const [x, h, z] = [states[0], states[this.state.layer], states[this.last]].map(pair);
    return `x ${x}, after layer ${this.state.layer} ${h}, z ${z}. log p ${number(logProb)}, log-det ${number(logDet)} nats.`;
  }

  // To a screen reader: the last of many, not each.
  say(text) {
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => (this.spoken.textContent = text), 500);
  }

  // The numbers of a point, but not into the field where the reader is typing.
  fill(pane, h) {
    this.panes[pane].inputs.forEach((input, i) => {
      if (this.shadowRoot.activeElement !== input) input.value = Number.isFinite(h[i]) ? Number(h[i].toPrecision(4)) : "";
    });
  }

  // --- the panes ---

  extent(name) {
    if (name === "data") return this.extents[0];
    const before = Math.floor(this.shown);
    const [a, b] = [this.extents[before], this.extents[Math.ceil(this.shown)]];
    return a + (b - a) * (this.shown - before);
  }

  draw() {
    if (!this.path) return;
    this.drawPane("data", 0);
    this.drawPane("latent", this.shown);
  }

  // One pane at a position among the layers. Between two layers everything moves on a straight line.
  drawPane(name, position) {
    const { canvas, handle } = this.panes[name];
    const extent = this.extent(name);
    const drawing = startDrawing(canvas, extent);
    if (!drawing) return;
    const { pen, width: size, colour, toPixels } = drawing;
    const [before, after] = [Math.floor(position), Math.ceil(position)];
    const part = position - before;
    const at = (states) => states[before].map((v, i) => (part ? v + (states[after][i] - v) * part : v));
    const trace = (points) => {
      let drawn = false;
      pen.beginPath();
      for (const point of points) {
        const pixels = toPixels(point);
        const there = pixels.every((v) => Math.abs(v) < 1e4);
        if (there) pen[drawn ? "lineTo" : "moveTo"](...pixels); // what is nowhere leaves a gap
        drawn = there;
      }
      pen.stroke();
    };

    if (this.state.density) {
      for (const [k, share] of [[before, 1 - part], [after, part]]) {
        if (!share) continue;
        const across = (size * this.extents[k]) / extent; // the picture was made for that layer's pane
        pen.globalAlpha = share;
        pen.drawImage(this.heat(k, colour), (size - across) / 2, (size - across) / 2, across, across);
      }
      pen.globalAlpha = 1;
    }
    if (this.state.grid) {
      pen.strokeStyle = colour("muted");
      pen.globalAlpha = 0.55;
      pen.lineWidth = 1;
      for (const line of this.grid) trace(line.map(at));
      pen.globalAlpha = 1;
    }
    if (this.state.points) {
      for (const states of this.points) {
        pen.fillStyle = hue(states[0]);
        dot(pen, toPixels(at(states)), 2.6);
      }
    }
    pen.strokeStyle = colour("text");
    pen.lineWidth = 3;
    pen.lineJoin = pen.lineCap = "round";
    for (const line of this.lines) trace(line.map(at));
    drawAxes(drawing, extent, name === "data" || !position ? "x" : position === this.last ? "z" : "h");
    if (name === "latent") this.drawPath(drawing, trace, position);

    // A point that left the pane, or is no number any more, waits at its edge, as a diamond.
    const h = at(this.path.states).map((v) => v / extent);
    const edge = 1 - 28 / size;
    const outside = !h.every((v) => Math.abs(v) <= 1);
    const [left, top] = outside ? h.map((v) => (Number.isNaN(v) ? edge : clamp(v, -edge, edge))) : h;
    handle.classList.toggle("outside", outside);
    handle.style.left = `${50 * (1 + left)}%`;
    handle.style.top = `${50 * (1 - top)}%`;
  }

  // Where the point was after each layer; what it has still to go is fainter.
  drawPath({ pen, colour, toPixels }, trace, position) {
    this.path.states.forEach((state, k, states) => {
      pen.globalAlpha = k <= position ? 1 : 0.4;
      pen.strokeStyle = pen.fillStyle = colour("bad");
      pen.lineWidth = 2;
      if (k) trace([states[k - 1], state]);
      dot(pen, toPixels(state), 3.5);
      pen.strokeStyle = colour("ground");
      pen.lineWidth = 1;
      pen.stroke();
    });
    pen.globalAlpha = 1;
  }

  heat(k, colours) {
    const [colour, extent] = [colours("accent"), this.extents[k]];
    const cached = this.heats[k];
    if (cached?.colour === colour && cached.extent === extent) return cached.picture;
    const picture = densityPicture(this.flow.flow.density(extent, HEAT, k), HEAT, colours);
    this.heats[k] = { colour, extent, picture };
    return picture;
  }
}

// How far an arrow key moves a point.
function stepOf(event) {
  return arrow(event)?.map((way) => way * (event.shiftKey ? STEP / 10 : STEP));
}

function describe({ kind, changed }) {
  if (kind === "scaling") return "scaling: both coordinates are multiplied, everywhere alike.";
  const [moves, decides] = changed[0] ? ["h₂ (up and down)", "h₁"] : ["h₁ (left and right)", "h₂"];
  return kind === "additive"
    ? `coupling: it moves ${moves}; ${decides} decides how far.`
    : `coupling: it moves and stretches ${moves}; ${decides} decides how much.`;
}

function effect(added) {
  if (!Number.isFinite(added)) return "What it adds to log p is no finite number.";
  return added < 0 ? `It takes ${number(-added)} nats from log p.` : `It adds ${number(added)} nats to log p.`;
}

customElements.define("flow-playground", FlowPlayground);
}
