// <flow-trainer>: a flow that learns before the reader's eyes, sound or broken on purpose, alone or beside a sound one. train.js
// holds the mathematics and the worker that trains. Without scripts the reader sees the element's content.
//
//   at        the first state, written like the address: train=moons&model=nice&broken=scaling&beside=1
//   compact   only the buttons and the pictures, for a chapter that has chosen the rest
"use strict";
{
const {
  STYLE, element, button, pill, opener, arrow, pointAt, followLooks, number, clamp, minus, hue,
  startDrawing, dot, drawAxes, densityPicture, quantile, readAddress, writeAddress, followAddress,
} = PlaygroundPage;
const { makeData, entropyOf, volumePreservingOptimum, mean, startWorker } = PlaygroundTraining;

const SETTINGS = {
  data: {
    title: "Data",
    options: {
      gaussians: "two Gaussians", moons: "two moons", circles: "two circles", spiral: "a spiral", numbers: "whole numbers", own: "your own points",
    },
  },
  model: { title: "Model", options: { nice: "NICE", realnvp: "RealNVP" } },
  base: { title: "Base", options: { normal: "normal", logistic: "logistic" } },
  couplings: { title: "Couplings", options: [2, 4, 8, 12] },
  width: { title: "Hidden units", options: [8, 16, 24, 48] },
  rate: { title: "Learning rate", options: [0.001, 0.003, 0.01, 0.03, 0.1] },
};
const FIRST = { data: "moons", model: "nice", base: "normal", couplings: 8, width: 24, rate: 0.01, seed: 1, broken: [], beside: true, own: "" };

// Each failure: its name, its entry in the clinic, what it needs of the state, and what the reader will see.
const FAILURES = {
  scaling: {
    name: "no scaling layer", entry: "F1", needs: "NICE", fits: ({ model }) => model === "nice",
    story: "A coupling of NICE slides points along one axis, and so keeps every area. The density of no point can exceed the base's peak. The loss stops above the best that keeps volume, and the latents fill less room than the base.",
  },
  alternation: {
    name: "masks do not alternate", entry: "F2", fits: () => true,
    story: "Only the second coordinate ever moves. The latents keep the points' order from left to right; the flow learns x₂ given x₁, and of x₁ at most a scale.",
  },
  mask: {
    name: "output not masked", entry: "F3", needs: "NICE", fits: ({ model }) => model === "nice",
    story: "The network also shifts the half that it reads. Such a coupling can pull all points together, and still claims a log-det of 0 (the log-det in the table comes from the scaling layer). So the loss falls below the entropy, the claimed density adds up to more than 1, and the inverse misses the points.",
  },
  logdet: {
    name: "log-det left out of the loss", entry: "F27", fits: () => true, excludes: "sign",
    story: "This loss is no −log p: it is lowest where every latent is 0. All latents go there, the loss falls to the base's peak, and the samples fly apart.",
  },
  sign: {
    name: "log-det subtracted", entry: "F27", fits: () => true, excludes: "logdet",
    story: "This loss is no −log p: it rewards shrinking, and falls without end. The true −log p of the points rises.",
  },
  tanh: {
    name: "no tanh", entry: "F12", needs: "RealNVP", fits: ({ model }) => model === "realnvp",
    story: "The log-scale is the network's output, without a bound. Far from the data the density is no finite number (hatched). One batch can end the run, the sooner if there is no clipping either.",
  },
  clipping: {
    name: "no clipping", entry: "F11", fits: () => true,
    story: "A long gradient goes into Adam as it is. On these data a flow with a tanh survives that. Take RealNVP and switch on “no tanh” as well, or take a higher rate, and watch the gradient's norm.",
  },
  rate: {
    name: "rate 30 times too high", entry: "P24", fits: () => true,
    story: "Each step moves every weight by up to 30 times as much. The loss leaps, and what it comes back to is a worse flow.",
  },
  column: {
    name: "a repeated column", entry: "F28", needs: "other data", fits: ({ data }) => data !== "numbers",
    story: "The second coordinate repeats the first, so the data lie on a line and their entropy is −∞. The loss has no lowest value: it falls as long as you train.",
  },
  noise: {
    name: "no noise", entry: "F6", needs: "whole numbers", fits: ({ data }) => data === "numbers",
    story: "All points of a cell are one point, so the density there can rise without end. Probabilities P(k) are at most 1, so an honest model of whole numbers has no loss below 0; this flow's loss falls below it.",
  },
};

const EXTENT = { numbers: 2 }; // half the width of the data's pane; with other data it is
const WIDE = 3.6; // as it is in the latent's pane, there in standard deviations of the base
const STD = { normal: 1, logistic: Math.PI / Math.sqrt(3) };
const SIDE = 72; // cells across a picture of the density
const EVERY = 100; // milliseconds between pictures
const CALM = 1000; // for readers who want less motion
const SPEAK = 5000; // milliseconds between two announcements
const LONGEST = 20_000; // steps
const FIRST_WORDS = "Press Train. Each step draws 256 new points and changes the weights once.";
const DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_"; // of an address: places of drawn points
const PLACE = 0.1; // between two places
const MOST = 150; // points that a reader can draw

const OWN_STYLE = `
  .title { font-size: .9rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .pill, .plain, select { font-size: .9rem; }
  .pill span, .plain, select { min-height: 2.25rem; }
  .settings { display: flex; flex-wrap: wrap; gap: .35rem 1rem; margin-bottom: .5rem; }
  .settings label { align-items: center; display: flex; font-weight: 600; gap: .35rem; }
  @container (max-width: 30rem) {
    .pill:has(input:disabled) { display: none; }
    .settings { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); }
    .settings label { align-items: stretch; flex-direction: column; gap: 0; }
  }
  legend { align-self: center; padding-right: .35rem; }
  button:disabled, .pill:has(input:disabled) { cursor: default; opacity: .5; }
  .pill input:disabled { cursor: default; }
  .own { display: inline-flex; gap: .35rem; }
  .tools { margin-block: .5rem; }
  .way { scroll-margin-top: 4rem; }
  .main { min-width: 5.5rem; justify-content: center; }
  [hidden] { display: none !important; }
  .panes { gap: .35rem .75rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .title::before { border-top: 3px solid var(--accent); content: ""; display: inline-block; margin-right: .4rem; vertical-align: .25em; width: 1.5rem; }
  .title.broken::before { border-top: 3px dashed var(--bad); }
  .now { min-height: 2.8em; }
  .view { display: grid; gap: .5rem 1rem; }
  .charts { display: flex; flex-direction: column; min-height: 21rem; }
  @container (min-width: 38rem) { .view:not(.one) { grid-template-columns: minmax(0, 4fr) minmax(0, 3fr); } }
  .drawing { cursor: cell; touch-action: none; }
  .chart { flex: 3 1 0; height: 0; min-height: 0; width: 100%; }
  .chart.small { flex: 2 1 0; }
  .facts { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
  th, td { border-bottom: 1px solid var(--border); padding: .2rem 1.25rem .2rem 0; text-align: left; vertical-align: top; }
  th { font-weight: 600; }
  tbody th { font-weight: 400; }
  td { white-space: nowrap; }
  .story a { color: var(--ring); }
  .story p { margin: .25rem 0; }
  .story:empty { display: none; }
  :host(:fullscreen) { background: var(--ground); overflow: auto; padding: 1rem; }
  :host(:fullscreen) .view { grid-template-columns: minmax(0, 76vh) minmax(0, 1fr); }
  :host([compact]) fieldset, :host([compact]) .settings, :host([compact]) .tools { display: none; }
`;

class FlowTrainer extends HTMLElement {
  connectedCallback() {
    this.leaves = new AbortController();
    const { signal } = this.leaves;
    if (!this.shadowRoot) {
      this.attachShadow({ mode: "open" });
      this.state = { ...FIRST };
      this.view = { samples: false, pen: false, slow: false };
      this.opened = null; // a flow of the reader's own to go on with: its name and description
      this.running = false;
      this.session = 0; // number of the session whose pictures are wanted
      this.build();
      if (!this.goToAddress()) this.take(new URLSearchParams(this.getAttribute("at") ?? ""));
    }
    // Whoever follows a link wants to see something happen.
    followAddress(this, "train", () => this.goToAddress() && !this.calm && this.train(true), signal);
    // A page may hold several: each starts its worker when the reader comes near.
    const near = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && this.wake(), { rootMargin: "300px" });
    near.observe(this);
    signal.addEventListener("abort", () => near.disconnect());
    followLooks(this.frame, () => this.draw(), signal);
    // Nobody watches a page that is hidden, and training it would empty a battery.
    document.addEventListener("visibilitychange", () => this.running && this.setPace(!document.hidden), { signal });
  }

  disconnectedCallback() {
    this.leaves.abort();
    this.running = false;
    this.worker?.terminate();
    this.worker = null;
  }

  wake() {
    if (this.worker) return;
    this.worker = startWorker();
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => (this.error.textContent = `The training stopped: ${event.message}`);
    this.begin();
  }

  // --- what is chosen ---

  goToAddress() {
    const wanted = readAddress(this, "train");
    if (!wanted) return false;
    this.running = false;
    this.take(wanted);
    this.shadowRoot.querySelector(".way").scrollIntoView();
    return true;
  }

  // A whole state from an address. What is not in it, or is no option, is as at first.
  take(wanted) {
    const state = { ...FIRST };
    for (const name of Object.keys(SETTINGS)) {
      state[name] = values(name).find((value) => String(value) === wanted.get(name === "data" ? "train" : name)) ?? FIRST[name];
    }
    state.seed = clamp(Math.round(Number(wanted.get("seed") ?? FIRST.seed)) || 0, 0, 9999);
    state.broken = (wanted.get("broken") ?? "").split(",").filter((name) => Object.hasOwn(FAILURES, name));
    state.beside = wanted.get("beside") !== "0";
    state.own = (wanted.get("own") ?? "").match(/^([\w-]{2})*/)[0].slice(0, 2 * MOST);
    this.state = state;
    this.opened = null;
    Object.assign(this.view, { samples: false, pen: this.empty });
    this.begin();
  }

  // An opened flow has no address: the address of another flow would name that one.
  writeAddress() {
    const { data, broken, beside, own, ...rest } = this.state;
    const state = { train: data, ...rest, broken: broken.join(","), beside: beside ? 1 : 0, ...(own && { own }) };
    writeAddress(this, "train", this.opened ? null : state);
  }

  // The reader changed something: train again from the start, and go on if it was running.
  change(changes) {
    Object.assign(this.state, changes);
    this.state.broken = this.state.broken.filter((name) => FAILURES[name].fits(this.state));
    this.begin();
    this.writeAddress();
    if (this.running) this.setPace(true);
  }

  get calm() {
    return matchMedia("(prefers-reduced-motion: reduce)").matches;
  }

  get points() {
    const place = (digit) => PLACE * (DIGITS.indexOf(digit) - 31.5);
    return (this.state.own.match(/../g) ?? []).map((digits) => [...digits].map(place));
  }

  // The reader has still to draw the points.
  get empty() {
    return this.state.data === "own" && !this.state.own;
  }

  get base() {
    return this.opened?.description.base ?? this.state.base;
  }

  // The failures that are switched on and can be: of those of one flow, and of one that was opened.
  get broken() {
    const built = ["scaling", "alternation", "mask", "tanh"]; // what an opened flow has or has not, as it is
    return this.state.broken.filter((name) => FAILURES[name].fits(this.state) && !(this.opened && built.includes(name)));
  }

  // A new session in the worker, with everything that depends on the choices.
  begin() {
    const { state, broken } = this;
    this.variants = broken.length && state.beside ? [[], broken] : [broken];
    this.names = this.variants.map((failures) => (failures.length ? "broken" : (this.opened?.name ?? "sound")));
    this.flows = this.variants.map(() => ({ losses: [], norms: [], stopped: null }));
    this.steps = 0;
    this.over = false;
    this.session += 1;
    this.extent = EXTENT[state.data] ?? WIDE;
    if (this.empty) this.running = false;
    this.layPanes();
    this.findLimits();
    this.tellStory();
    this.facts.replaceChildren();
    this.error.textContent = "";
    this.now.textContent = this.empty ? "Draw points in the data's pane: with the pen, or with the arrow keys and the space bar." : FIRST_WORDS;
    if (this.empty || !this.worker) return this.draw();
    const choices = { ...state, own: this.points, base: this.base };
    this.worker.postMessage({
      begin: [choices, this.variants, this.opened?.description ?? null],
      id: this.session, extent: this.extent, side: SIDE, every: this.calm ? CALM : EVERY,
    });
  }

  // The lines of the loss's chart, in nats.
  findLimits() {
    const { broken, base } = this;
    this.limits = [];
    this.entropy = null;
    if (this.empty) return;
    const draw = (at, name) => this.limits.push({ at, text: `${name}: ${number(at)}` });
    const set = makeData(this.state.data, this.points);
    const changed = broken.some((name) => name === "column" || name === "noise"); // the broken flow's data are others
    this.entropyName = changed ? "entropy of the sound flow's data" : "entropy of the data";
    if (!changed || this.variants.length > 1) draw((this.entropy = entropyOf(set)), this.entropyName);
    const keepsVolume = broken.includes("scaling") && !broken.includes("mask");
    if (keepsVolume && !changed) draw(volumePreservingOptimum(set, base), "best that keeps volume");
    if (keepsVolume || broken.includes("logdet")) {
      const [peak, formula] = base === "normal" ? [Math.log(2 * Math.PI), "(D/2) log 2π"] : [2 * Math.log(4), "D log 4"];
      draw(peak, `base's peak, ${formula}`);
    }
    if (broken.includes("noise")) draw(0, "no honest loss is lower");
  }

  // --- training ---

  setPace(on) {
    this.worker.postMessage({ pace: on ? (this.view.slow ? "slow" : "full") : "stop" });
  }

  train(on) {
    this.wake();
    this.running = on && !this.over && !this.empty;
    this.setPace(this.running);
    this.showChoices();
    this.writeAddress();
    this.say(this.running ? "Training." : `Paused. ${this.summary()}`);
  }

  receive({ id, picture, over, written }) {
    if (written) return this.written(written);
    this.worker.postMessage({ seen: true });
    if (id !== this.session) return;
    picture.flows.forEach((flow, i) => {
      const { losses, norms } = this.flows[i];
      losses.push(...flow.losses);
      norms.push(...flow.norms);
      this.flows[i] = { ...flow, losses, norms };
    });
    this.steps = picture.steps;
    this.over = over || this.steps >= LONGEST;
    if (this.over && this.running) this.train(false);
    this.draw();
    this.report();
  }

  // --- the page ---

  build() {
    Object.assign(this, { selects: {}, toggles: {}, switches: {} }); // what shows the state
    this.shadowRoot.append(
      element("style", {}, STYLE + OWN_STYLE),
      element("div.settings", {}, ...Object.keys(SETTINGS).map((name) => this.select(name))),
      this.failures(),
      this.buttons(),
      (this.now = element("p.now")),
      (this.both = element("div.view", {},
        (this.frame = element("div.panes")),
        element("div.charts", {},
          (this.chart = element("canvas.chart", { role: "img", "aria-label": "the loss" })),
          (this.normChart = element("canvas.chart.small", { role: "img", "aria-label": "the gradient's norm" }))))),
      this.tools(),
      (this.story = element("div.story.broken")),
      (this.facts = element("div.facts")),
      (this.error = element("p.error", { role: "alert" })),
      (this.spoken = element("p.hidden", { role: "status" })));
  }

  failures() {
    const pills = Object.entries(FAILURES).map(([name, { name: text, excludes }]) => {
      const onchange = () => {
        const others = this.state.broken.filter((other) => other !== name && !(input.checked && other === excludes));
        this.change({ broken: input.checked ? [...others, name] : others });
        this.say(this.story.textContent);
      };
      const input = (this.switches[name] = element("input", { type: "checkbox", onchange }));
      return pill(input, text);
    });
    return element("fieldset.broken", {}, element("legend", {}, "Broken"), ...pills);
  }

  select(name) {
    const { title, options } = SETTINGS[name];
    const texts = Object.values(options);
    const onchange = () => {
      const value = values(name)[input.selectedIndex];
      if (name !== "data" && name !== "rate") this.opened = null;
      if (value === "own" && !this.state.own) this.view.pen = true;
      this.change({ [name]: value });
    };
    const input = element("select", { onchange }, ...values(name).map((value, i) => element("option", { value }, texts[i])));
    this.selects[name] = input;
    return element("label", {}, title, input);
  }

  buttons() {
    this.player = button("Train", () => this.train(!this.running), { class: "plain main" });
    this.stepper = button("Step", () => {
      this.train(false);
      this.worker.postMessage({ steps: 1 });
    }, { title: "one step on one batch of 256 points" });
    return element("div.way", {},
      this.player,
      this.stepper,
      button("Start again", () => this.change({})),
      button("Another seed", () => this.change({ seed: (this.state.seed + 1) % 10_000 }), { title: "start again from other weights, with other batches" }),
      this.toggle("slow", "slow", () => this.running && this.setPace(true), { title: "ten steps per second" }),
      ...(document.fullscreenEnabled ? [button("full screen", () => this.requestFullscreen(), { title: "for a lecture; Escape ends it" })] : []),
      (this.besides = button("beside a sound flow", () => this.change({ beside: !this.state.beside }))));
  }

  toggle(text, name, act, attributes = {}) {
    this.toggles[name] = button(text, () => {
      this.view[name] = !this.view[name];
      act();
      this.showChoices();
      this.draw();
    }, attributes);
    return this.toggles[name];
  }

  tools() {
    this.penTools = element("span.own", {},
      this.toggle("pen", "pen", () => (this.view.samples = false)),
      button("wipe", () => {
        this.view.pen = true;
        this.change({ own: "" });
      }));
    return element("div.tools", {},
      this.toggle("samples instead of data", "samples", () => (this.view.pen = false)),
      this.penTools,
      (this.saver = button("", () => this.write((description) => this.save(description)), { title: "as JSON, for nflows_lib" })),
      (this.inside = button("", () => this.write((description) => this.lookInside(description)), { title: "hand the flow to the playground on this page" })),
      opener((file) => this.open(file)));
  }

  showChoices() {
    const { state, view, broken } = this;
    for (const [name, input] of Object.entries(this.selects)) input.value = this.opened && name !== "data" && name !== "rate" ? "" : state[name];
    for (const [name, one] of Object.entries(this.toggles)) one.setAttribute("aria-pressed", view[name]);
    for (const [name, input] of Object.entries(this.switches)) {
      input.checked = broken.includes(name);
      const { name: text, needs, fits } = FAILURES[name];
      input.disabled = !fits(state);
      input.nextElementSibling.textContent = input.disabled ? `${text} (${needs})` : text;
    }
    this.besides.setAttribute("aria-pressed", state.beside);
    this.besides.disabled = !broken.length;
    const which = broken.length ? "the broken flow" : "the flow";
    this.saver.textContent = `save ${which}`;
    this.inside.textContent = `look inside ${which}`;
    this.penTools.hidden = state.data !== "own";
    this.inside.hidden = !document.querySelector("flow-playground");
    this.player.textContent = this.running ? "Pause" : "Train";
    this.player.disabled = this.stepper.disabled = this.empty || this.over;
    for (const [{ frame }] of this.panes ?? []) {
      frame.classList.toggle("drawing", this.drawing);
      // An application, since a screen reader would keep the arrow keys to itself.
      for (const [name, value] of [["tabindex", 0], ["role", "application"], ["aria-label", "draw points: arrow keys move, space puts a point"]]) {
        if (this.drawing) frame.setAttribute(name, value);
        else frame.removeAttribute(name);
      }
    }
  }

  get drawing() {
    return this.state.data === "own" && this.view.pen;
  }

  // Data and latent of one flow stand side by side; two flows stand side by side, latent under data.
  layPanes() {
    const wanted = this.variants.length;
    if (this.panes?.length !== wanted) {
      this.panes = this.variants.map(() => [this.pane(true), this.pane(false)]);
      const inOrder = wanted === 1 ? this.panes[0] : [0, 1].flatMap((k) => this.panes.map((pair) => pair[k]));
      this.frame.replaceChildren(...inOrder.map(({ whole }) => whole));
    }
    this.panes.forEach(([data, latent], i) => {
      data.title.textContent = `${this.names[i]}: data x`;
      latent.title.textContent = `${this.names[i]}: latent z`;
      for (const { title } of [data, latent]) title.className = this.variants[i].length ? "title broken" : "title";
    });
    this.both.className = wanted === 1 ? "view one" : "view";
    this.showChoices();
  }

  pane(isData) {
    const canvas = element("canvas", { role: "img" });
    const title = element("p.title");
    const frame = element("div.pane", {}, canvas);
    if (isData) this.letDraw(frame, canvas);
    return { canvas, title, frame, whole: element("div", {}, title, frame) };
  }

  // --- the pen ---

  // Points of the reader's own. By keyboard the arrow keys move a place, and the space bar puts a point there.
  letDraw(frame, canvas) {
    const put = (event) => this.put(pointAt(event, canvas, this.extent));
    frame.addEventListener("pointerdown", (event) => {
      if (!this.drawing || event.button !== 0 || !event.isPrimary) return;
      event.preventDefault();
      frame.setPointerCapture(event.pointerId);
      put(event);
    });
    frame.addEventListener("pointermove", (event) => this.drawing && frame.hasPointerCapture(event.pointerId) && put(event));
    frame.addEventListener("lostpointercapture", () => this.change({}));
    frame.addEventListener("keydown", (event) => {
      const step = arrow(event);
      if (!this.drawing || (event.key !== " " && !step)) return;
      event.preventDefault();
      this.cursor ??= [0, 0];
      if (!step) {
        this.put(this.cursor);
        return this.change({});
      }
      this.cursor = this.cursor.map((v, i) => clamp(v + 2 * PLACE * step[i], -3, 3));
      this.draw();
      this.say(`Place ${this.cursor.map((v) => minus(v.toFixed(1))).join(", ")}.`);
    });
  }

  // A point at the nearest place, unless the last one is there or the drawing is full.
  put(at) {
    const digits = at.map((v) => DIGITS[clamp(Math.round(v / PLACE + 31.5), 0, 63)]).join("");
    if (this.state.own.length >= 2 * MOST || this.state.own.endsWith(digits)) return;
    this.state.own += digits;
    this.draw();
  }

  // --- files ---

  // Ask the worker for the last flow's description: the broken one of two.
  write(then) {
    this.afterWriting = then;
    this.error.textContent = "";
    this.worker.postMessage({ write: this.variants.length - 1 });
  }

  written(description) {
    try {
      this.afterWriting(PlaygroundFlow.encode(description));
    } catch (error) {
      this.error.textContent = `This flow cannot be written: ${error.message}.`;
    }
  }

  save(json) {
    if (json.layers.some(({ kind, gain }) => kind === "affine" && gain === undefined)) {
      throw new Error("the library has no affine coupling without a tanh");
    }
    const address = URL.createObjectURL(new Blob([JSON.stringify(json)], { type: "application/json" }));
    element("a", { href: address, download: this.broken.length ? "broken-flow.json" : "flow.json" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  lookInside(json) {
    const playground = document.querySelector("flow-playground");
    playground.open(new File([JSON.stringify(json)], `The ${this.broken.length ? "broken " : ""}flow that was trained for ${this.steps} steps`));
    playground.scrollIntoView();
  }

  // Go on with a flow from a file. A file that cannot be read changes nothing.
  async open(file) {
    const opened = await PlaygroundFlow.read(file, "trained", this.error);
    if (!opened) return;
    this.opened = opened;
    this.running = false;
    this.change({});
  }

  // --- words and numbers ---

  tellStory() {
    const told = this.broken.map((name) => {
      const { entry, story, name: title } = FAILURES[name];
      return element("p", {}, element("b", {}, `${title[0].toUpperCase()}${title.slice(1)}. `), `${story} `,
        element("a", { href: `clinic.html#clinic-${entry.toLowerCase()}` }, `Clinic ${entry}`), ".");
    });
    this.story.replaceChildren(...told);
  }

  summary() {
    const told = this.flows.map(({ nll, stopped }, i) => {
      const name = this.flows.length > 1 || stopped ? `${this.names[i]} ` : "";
      if (stopped) return `${name}stopped at step ${count(stopped.step)}, as the ${stopped.what === "loss" ? "loss" : "gradient's norm"} was no finite number`;
      return `${name}${number(nll ?? NaN)} nats`;
    });
    const entropy = this.entropy === null ? "" : `; ${this.entropyName} ${number(this.entropy)}`;
    const end = this.steps >= LONGEST ? " Here training ends." : "";
    return `Step ${count(this.steps)}, seed ${this.state.seed}. −log p of new points: ${told.join(", ")}${entropy}.${end}`;
  }

  report() {
    this.now.textContent = this.steps ? this.summary() : FIRST_WORDS;
    const rows = [
      ["−log p of 2,000 new points, nats", ({ nll }) => number(nll)],
      ["loss as trained, mean of 100 steps", ({ losses }) => (losses.length ? number(mean(losses.slice(-100))) : "–")],
      ["log-det, mean", ({ logDet }) => number(logDet)],
      ["latents' mean", ({ latentMean }) => latentMean.map(number).join(", ")],
      ["latents' standard deviation", ({ latentStd }) => latentStd.map(tiny).join(", ")],
      ["gradient's norm, last step", ({ norms }) => (norms.length ? number(norms.at(-1)) : "–")],
      ["round trip: largest error", ({ missed }) => tiny(missed)],
    ];
    if (this.broken.includes("mask")) rows.push(["claimed density, added up over the pane", ({ mass }) => number(mass)]);
    const step = ({ stopped }) => ` (step ${count(stopped?.step ?? this.steps)})`;
    const heads = this.flows.map((flow, i) => element("th", { scope: "col" }, this.names[i] + step(flow)));
    const body = rows.map(([name, read]) => element("tr", {}, element("th", { scope: "row" }, name), ...this.flows.map((flow) => element("td", {}, read(flow)))));
    this.facts.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, element("td", {}), ...heads)), element("tbody", {}, ...body)));
    if (this.running && performance.now() - (this.spokenAt ?? 0) > SPEAK) this.say(this.summary());
  }

  say(text) {
    this.spokenAt = performance.now();
    this.spoken.textContent = text;
  }

  // --- pictures ---

  draw() {
    if (!this.panes) return;
    // One scale of shading for all panes: that of the first flow.
    const [{ density }] = this.flows;
    this.darkest = density && quantile(density, 0.99);
    this.panes.forEach(([data, latent], i) => {
      this.drawPane(data.canvas, this.flows[i], true);
      this.drawPane(latent.canvas, this.flows[i], false);
      const what = this.view.samples ? "samples" : "data";
      data.canvas.setAttribute("aria-label", `The density of the flow (${this.names[i]}) after ${this.steps} steps, and its ${what}.`);
      latent.canvas.setAttribute("aria-label", `The latents of the ${what} after ${this.steps} steps (${this.names[i]}), on circles of the base.`);
    });
    this.drawChart(this.chart, "losses", this.limits);
    const clipped = this.variants.filter((failures) => !failures.includes("clipping")).length;
    const clip = { at: Math.log10(5), text: clipped < this.flows.length ? "the sound flow's is clipped to 5" : "clipped to 5" };
    this.drawChart(this.normChart, "norms", clipped ? [clip] : []);
  }

  drawPane(canvas, flow, isData) {
    const std = STD[this.base];
    const extent = isData ? this.extent : WIDE * std;
    const drawing = startDrawing(canvas, extent);
    if (!drawing) return;
    const { pen, width: size, colour, toPixels } = drawing;
    if (isData && flow.density) pen.drawImage(densityPicture(flow.density, SIDE, colour, this.darkest), 0, 0, size, size);
    if (!isData) {
      pen.strokeStyle = colour("muted");
      pen.globalAlpha = 0.5;
      for (const radius of [1, 2, 3]) {
        pen.beginPath();
        pen.arc(size / 2, size / 2, (radius * std * size) / 2 / extent, 0, 2 * Math.PI);
        pen.stroke();
      }
      pen.globalAlpha = 1;
    }
    const { samples } = this.view;
    const [points, latents] = samples ? [flow.samples, flow.noise] : [flow.points, flow.latents];
    const [shown, from] = [isData ? points : latents, samples ? latents : points];
    const n = (shown?.length ?? 0) / 2;
    for (let b = 0; b < n; b++) {
      pen.fillStyle = hue([from[b], from[n + b]]);
      dot(pen, toPixels([shown[b], shown[n + b]]), size < 250 ? 1.7 : 2.4);
    }
    if (isData && this.drawing) {
      pen.fillStyle = colour("text");
      for (const point of this.points) pen.fillRect(...toPixels(point).map((v) => v - 1.5), 3, 3);
      if (this.cursor) {
        const [left, top] = toPixels(this.cursor);
        pen.fillRect(left - 8, top - 0.75, 16, 1.5);
        pen.fillRect(left - 0.75, top - 8, 1.5, 16);
      }
    }
    drawAxes(drawing, extent, isData ? "x" : "z");
    pen.textAlign = "right";
    if (flow.density) label(drawing, isData ? `darkest: p ≥ ${tiny(this.darkest)}` : "rings: 1, 2, 3 std", size - 6, 14);
  }

  // The losses or the gradients' norms against the steps: in each column of pixels the mean, and a band from lowest to highest. What
  // leaves the axis of the losses at the top is told in words.
  drawChart(canvas, what, limits) {
    const drawing = startDrawing(canvas);
    if (!drawing) return;
    const { pen, width, height, colour } = drawing;
    const isLoss = what === "losses";
    const [left, right, top, bottom] = [44, width - 8, 20, height - 20];
    const steps = Math.max(200, this.steps);
    // Of the losses, or of the norms' logarithms.
    const columns = this.flows.map((flow) => binned(isLoss ? flow[what] : flow[what].map(Math.log10), steps, Math.max(1, Math.floor(right - left))));
    const [low, high] = isLoss ? this.lossRange(columns.flat(), limits) : normRange(columns.flat());
    const place = (v) => clamp(bottom - ((v - low) / (high - low)) * (bottom - top), top, bottom);
    // Axes.
    pen.font = "12px sans-serif";
    pen.fillStyle = colour("text");
    pen.strokeStyle = colour("border");
    pen.lineWidth = 1;
    for (const tick of ticks(low, high, isLoss ? 5 : 3, !isLoss)) {
      drawRow(pen, left, right, place(tick));
      pen.textAlign = "right";
      pen.fillText(isLoss ? minus(Number(tick.toFixed(2))) : power(tick), left - 5, place(tick) + 4);
    }
    for (const tick of ticks(0, steps, 4)) {
      pen.textAlign = tick > 0.9 * steps ? "right" : "center";
      pen.fillText(count(tick), left + (tick / steps) * (right - left), height - 5);
    }
    pen.textAlign = "left";
    pen.font = "600 12px sans-serif";
    pen.fillText(isLoss ? "loss as trained (nats)" : "gradient's norm (log scale)", left, 12);
    // Curves, broken ones dashed, since colour alone would not tell them apart.
    columns.forEach((bins, i) => {
      this.takePen(drawing, i);
      pen.globalAlpha = 0.2;
      for (const { x, least, most } of bins) {
        if (Number.isNaN(least + most)) continue;
        pen.fillRect(left + x, place(most), 1, Math.max(place(least) - place(most), 1));
      }
      pen.globalAlpha = 1;
      pen.beginPath();
      let inside = false;
      for (const { x, mean } of bins) {
        const there = Number.isFinite(mean) && (!isLoss || mean <= high);
        if (there) pen[inside ? "lineTo" : "moveTo"](left + x, place(mean));
        inside = there;
      }
      pen.stroke();
      const most = Math.max(...bins.filter(({ x }) => x > 0.1 * (right - left)).map((bin) => bin.most));
      pen.textAlign = "right";
      if (isLoss && most > 2 * high - low) label(drawing, `▲ up to ${large(most)}`, right, top + 12 + 14 * i, pen.fillStyle);
      const { stopped } = this.flows[i];
      if (stopped) {
        pen.font = "700 15px sans-serif";
        pen.fillText("✕", left + (stopped.step / steps) * (right - left) - 6, top + 12);
      }
    });
    const last = (flow, i) => `${this.names[i]} ${number(flow[what].at(-1) ?? NaN)}`;
    canvas.setAttribute("aria-label", `The ${isLoss ? "loss" : "gradient's norm"} after ${this.steps} steps: ${this.flows.map(last).join(", ")}.`);
    this.drawLimits(drawing, limits, { left, right, place, bottom });
  }

  // From the lowest to the highest loss of the chart. The first steps, and single leaps, may leave it at the top.
  lossRange(bins, limits) {
    const lines = limits.map(({ at }) => at);
    const means = bins.map(({ mean }) => mean);
    const first = Math.max(...this.flows.map((flow) => flow.losses[0] ?? 4));
    const usual = quantile(means, 0.9) ?? first;
    const low = Math.min(...lines, quantile(means, 0) ?? first);
    const high = Math.max(...lines, Math.min(usual, first), low + 0.5);
    return [low - 0.1 * (high - low), high + 0.25 * (high - low)];
  }

  // The colour and the dashes of a flow's line.
  takePen({ pen, colour }, i) {
    const broken = this.variants[i].length > 0;
    pen.fillStyle = pen.strokeStyle = colour(broken ? "bad" : "accent");
    pen.setLineDash(broken ? [7, 3] : []);
    pen.lineWidth = 1.8;
  }

  // Horizontal lines, each with its name below it, or further down where another name stands; above it at the chart's end.
  drawLimits(drawing, limits, { left, right, place, bottom }) {
    const { pen, colour } = drawing;
    pen.strokeStyle = colour("text");
    pen.lineWidth = 1;
    pen.setLineDash([2, 3]);
    for (const { at } of limits) drawRow(pen, left, right, place(at));
    pen.textAlign = "right";
    let free = 0;
    for (const { at, text } of [...limits].sort((a, b) => b.at - a.at)) {
      const under = Math.max(place(at) + 12, free);
      const y = under > bottom - 2 ? place(at) - 4 : under;
      free = y + 13;
      label(drawing, text, right, y);
    }
  }
}

// Text on a chart, on the ground's colour, which keeps it readable on curves.
function label({ pen, colour }, text, x, y, ink = colour("text")) {
  pen.font = "12px sans-serif";
  pen.lineJoin = "round";
  pen.lineWidth = 4;
  pen.strokeStyle = colour("ground");
  pen.setLineDash([]);
  pen.strokeText(text, x, y);
  pen.fillStyle = ink;
  pen.fillText(text, x, y);
}

// From the lowest to the highest logarithm of a norm in the chart.
function normRange(bins) {
  const found = bins.filter(({ most }) => Number.isFinite(most));
  const low = Math.min(-1, ...found.map(({ least }) => least));
  const high = Math.max(2, ...found.map(({ most }) => most));
  return [Math.max(low, -3) - 0.1, Math.min(high, 12) + 0.1];
}

function drawRow(pen, from, to, y) {
  pen.beginPath();
  pen.moveTo(from, y);
  pen.lineTo(to, y);
  pen.stroke();
}

// The values of a setting, as the state holds them.
function values(name) {
  const { options } = SETTINGS[name];
  return Array.isArray(options) ? options : Object.keys(options);
}

// Per column of pixels: the mean, the least and the most of its values; "x" is the column.
function binned(values, steps, columns) {
  const bins = [];
  values.forEach((value, k) => {
    const x = Math.floor((k / steps) * columns);
    if (bins.at(-1)?.x !== x) bins.push({ x, all: [] });
    bins.at(-1).all.push(value);
  });
  return bins.map(({ x, all }) => ({ x, mean: mean(all), least: Math.min(...all), most: Math.max(...all) }));
}

// About n round numbers from low to high; whole ones if they are exponents.
function ticks(low, high, n, whole = false) {
  const rough = (high - low) / n;
  const unit = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].find((factor) => factor * unit >= rough) * unit;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}

function count(steps) {
  return steps.toLocaleString("en");
}

function tiny(value) {
  if (!Number.isFinite(value)) return number(value);
  return value >= 0.01 || value === 0 ? number(value) : minus(value.toExponential(0));
}

function large(value) {
  return value < 1e6 ? number(value) : value.toExponential(0).replace("+", "");
}

// A power of ten.
function power(exponent) {
  return Math.abs(exponent) <= 3 ? String(Number((10 ** exponent).toPrecision(1))) : `1e${minus(exponent)}`;
}

customElements.define("flow-trainer", FlowTrainer);
}
