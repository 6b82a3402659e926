// <flow-trainer>: a flow that learns before the reader's eyes, sound or broken on purpose, alone or beside a sound one. train.js
// holds the mathematics and the worker that trains; page.js what the playground's elements share. A reader without scripts
// sees the element's content in the page, a picture and its text.
//
//   at        the first state, written like the address: train=moons&model=nice&broken=scaling&beside=1
//   compact   only the buttons and the pictures, for a chapter that has chosen the rest
"use strict";
{
  const {
    STYLE, element, button, pill, opener, arrow, pointAt, followLooks, number, clamp, minus, hue,
    startDrawing, dot, drawAxes, densityPicture, readAddress, writeAddress, clearAddress, followAddress,
  } = PlaygroundPage;
  const { makeData, entropyOf, volumePreservingOptimum, startWorker } = PlaygroundTraining;

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
  const FIRST = { data: "gaussians", model: "nice", base: "normal", couplings: 8, width: 24, rate: 0.01, seed: 1, broken: [], beside: true, own: "" };

  // Each failure: its name, its entry in the clinic, when it can be switched on, and what the reader will see.
  const FAILURES = {
    scaling: {
      name: "no scaling layer", entry: "F1", fits: ({ model }) => model === "nice",
      story: "Shears keep every area, so the density of no point can exceed the base's peak. The loss stops above the volume-preserving optimum, and the latents fill less room than the base.",
    },
    alternation: {
      name: "masks do not alternate", entry: "F2", fits: () => true,
      story: "Only the second coordinate ever moves. In the latent's pane each point stays above the place where it began, but for the scaling; the flow learns x₂ given x₁, and nothing about x₁.",
    },
    mask: {
      name: "output not masked", entry: "F3", fits: ({ model }) => model === "nice",
      story: "The network also shifts the half that it reads. The layer still claims a log-det of 0, so the flow may pull all points together for nothing: the loss falls below the entropy, the claimed density adds up to more than 1, and the inverse misses the points.",
    },
    logdet: {
      name: "log-det left out of the loss", entry: "F27", fits: () => true, excludes: "sign",
      story: "The loss is lowest where every latent is 0. All latents go there, the loss falls to its limit, and the samples fly apart.",
    },
    sign: {
      name: "log-det subtracted", entry: "F27", fits: () => true, excludes: "logdet",
      story: "Shrinking is now rewarded: the loss falls without end, and the density at the data goes to 0.",
    },
    tanh: {
      name: "no tanh", entry: "F12", fits: ({ model }) => model === "realnvp",
      story: "The log-scale is the network's output, without a bound. Far from the data the density is no finite number (hatched). Together with no clipping, one batch can end the run.",
    },
    clipping: {
      name: "no clipping", entry: "F11", fits: () => true,
      story: "A long gradient goes into Adam as it is. On these data a flow with tanh often survives that: watch the gradient's norm, and add no tanh or a higher rate.",
    },
    rate: {
      name: "rate 30 times too high", entry: "P24", fits: () => true,
      story: "Each step moves every weight by up to 30 times as much. The loss leaps, and what it comes back to is a worse flow.",
    },
    column: {
      name: "a repeated column", entry: "F28", fits: ({ data }) => data !== "numbers",
      story: "The second coordinate repeats the first, so the data lie on a line and their entropy is −∞. The loss has no lowest value: it falls as long as you train.",
    },
    noise: {
      name: "no noise", entry: "F6", fits: ({ data }) => data === "numbers",
      story: "All points of a cell are one point, so the density there can rise without end. No honest model of whole numbers has a loss below 0 (P(k) ≤ 1); this flow's falls below it.",
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
    .title { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
    .pill, button.plain, select { font-size: .9rem; }
    label.pill span, button.plain, select { min-height: 2.25rem; }
    .settings { display: flex; flex-wrap: wrap; gap: .35rem 1rem; margin-bottom: .5rem; }
    .settings label { align-items: center; display: flex; font-weight: 600; gap: .35rem; }
    legend { align-self: center; padding-right: .35rem; }
    select { background: var(--ground); border: 1px solid var(--muted); border-radius: .3rem; color: var(--text); font-family: inherit; padding: .1rem .3rem; }
    button:disabled { cursor: default; opacity: .5; }
    button.main { min-width: 5.5rem; justify-content: center; }
    [hidden] { display: none !important; }
    .panes { gap: .35rem .75rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
    .view { display: grid; gap: .5rem 1rem; }
    .charts { display: flex; flex-direction: column; min-height: 19rem; }
    @container (min-width: 38rem) { .view { grid-template-columns: minmax(0, 4fr) minmax(0, 3fr); } }
    .drawing { cursor: cell; touch-action: none; }
    .chart { flex: 3 1 0; height: 0; min-height: 0; width: 100%; }
    .chart.small { flex: 1 1 0; }
    .facts { overflow-x: auto; }
    table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
    th, td { border-bottom: 1px solid var(--border); padding: .2rem 1.25rem .2rem 0; text-align: left; vertical-align: top; }
    th { font-weight: 600; }
    tbody th { font-weight: 400; }
    td { white-space: nowrap; }
    .story a { color: var(--ring); }
    .story p { margin: .25rem 0; }
    .story:empty { display: none; }
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
      followAddress(this, "train", () => this.goToAddress(), signal);
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
      this.scrollIntoView();
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
      state.own = (wanted.get("own") ?? "").replaceAll(/[^\w-]/g, "").slice(0, 2 * MOST);
      state.own = state.own.slice(0, 2 * Math.floor(state.own.length / 2));
      this.state = state;
      this.opened = null;
      this.view.pen = this.empty;
      this.begin();
    }

    // An opened flow has no address: the address of another flow would name that one.
    writeAddress() {
      const { data, broken, beside, own, ...rest } = this.state;
      const params = new URLSearchParams({ train: data, ...rest, broken: broken.join(","), beside: beside ? 1 : 0 });
      if (own) params.set("own", own);
      if (this.opened) clearAddress(this, "train");
      else writeAddress(this, params);
    }

    // The reader changed something: train again from the start, and go on if it was running.
    change(changes) {
      Object.assign(this.state, changes);
      this.begin();
      this.writeAddress();
      if (this.running) this.setPace(true);
    }

    get points() {
      const place = (digit) => PLACE * (DIGITS.indexOf(digit) - 31.5);
      return Array.from({ length: this.state.own.length / 2 }, (_, i) => [place(this.state.own[2 * i]), place(this.state.own[2 * i + 1])]);
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
      const sound = this.opened?.name ?? "sound";
      this.names = this.variants.map((failures) => failures.map((name) => FAILURES[name].name).join(", ") || sound);
      this.flows = this.variants.map(() => ({ losses: [], norms: [], stopped: null }));
      this.steps = 0;
      this.over = false;
      this.session += 1;
      this.extent = EXTENT[state.data] ?? WIDE;
      if (this.empty) this.running = false;
      this.layPanes();
      this.findLimits();
      this.tellStory();
      this.now.textContent = this.empty ? "Draw points in the data's pane: with the pen, or with the arrow keys and the space bar." : FIRST_WORDS;
      if (this.empty || !this.worker) return this.draw();
      const choices = { ...state, own: this.points, base: this.base };
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.worker.postMessage({
        begin: [choices, this.variants, this.opened?.description ?? null],
        id: this.session, extent: this.extent, side: SIDE, every: calm ? CALM : EVERY,
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
      if (!changed || this.variants.length > 1) draw((this.entropy = entropyOf(set)), "entropy of the data");
      const [peak, formula] = base === "normal" ? [Math.log(2 * Math.PI), "(D/2) log 2π"] : [2 * Math.log(4), "D log 4"];
      if (broken.includes("scaling") && !broken.includes("mask")) {
        if (!changed) draw(volumePreservingOptimum(set, base), "best that keeps volume");
        draw(peak, `F1's limit, ${formula}`);
      } else if (broken.includes("logdet")) draw(peak, `lowest without log-det, ${formula}`);
      if (broken.includes("noise")) draw(0, "P(k) = 1: no honest loss is lower");
    }

    // --- training ---

    setPace(on) {
      this.worker.postMessage({ pace: on ? (this.view.slow ? "slow" : "full") : "stop" });
    }

    train(on) {
      this.running = on && !this.over && !this.empty;
      this.setPace(this.running);
      this.showChoices();
      this.say(this.running ? "Training." : `Paused. ${this.summary()}`);
    }

    receive({ id, picture, over, written }) {
      if (written) return this.written(written);
      this.worker.postMessage({ seen: true });
      if (id !== this.session) return;
      picture.flows.forEach((flow, i) => {
        const mine = this.flows[i];
        const { losses, norms } = mine;
        losses.push(...flow.losses);
        norms.push(...flow.norms);
        Object.assign(mine, flow, { losses, norms });
      });
      this.steps = picture.steps;
      this.over = over || this.steps >= LONGEST;
      if (this.over && this.running) this.train(false);
      this.draw();
      this.report();
    }

    // --- the page ---

    build() {
      const root = this.shadowRoot;
      Object.assign(this, { selects: {}, toggles: {} }); // what shows the state
      root.append(
        element("style", {}, STYLE + OWN_STYLE),
        element("div", { class: "settings" }, ...Object.keys(SETTINGS).map((name) => this.select(name))),
        this.failures(),
        this.buttons(),
        (this.now = element("p", { class: "now" })),
        element("div", { class: "view" },
          (this.frame = element("div", { class: "panes" })),
          element("div", { class: "charts" },
            (this.chart = element("canvas", { class: "chart", role: "img" })),
            (this.normChart = element("canvas", { class: "chart small", role: "img" })))),
        (this.story = element("div", { class: "story broken" })),
        (this.facts = element("div", { class: "facts" })),
        this.tools(),
        (this.error = element("p", { class: "error", role: "alert" })),
        (this.spoken = element("p", { class: "hidden", role: "status" })));
    }

    failures() {
      this.switches = {};
      const pills = Object.entries(FAILURES).map(([name, { name: text, excludes }]) => {
        const onchange = () => {
          const others = this.state.broken.filter((other) => other !== name && !(input.checked && other === excludes));
          this.change({ broken: input.checked ? [...others, name] : others });
          this.say(this.story.textContent);
        };
        const input = (this.switches[name] = element("input", { type: "checkbox", onchange }));
        return pill(input, text, "pill broken");
      });
      return element("fieldset", {}, element("legend", {}, "Broken"), ...pills);
    }

    select(name) {
      const { title, options } = SETTINGS[name];
      const texts = Array.isArray(options) ? options.map(String) : Object.values(options);
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
      return element("div", { class: "way" },
        this.player,
        this.stepper,
        button("Start again", () => this.change({})),
        button("Another seed", () => this.change({ seed: (this.state.seed + 1) % 10_000 }), { title: "start again from other weights, with other batches" }),
        this.toggle("slow", "slow", () => this.running && this.setPace(true)),
        (this.besides = button("beside a sound flow", () => this.change({ beside: !this.state.beside }))));
    }

    toggle(text, name, act) {
      const one = button(text, () => {
        this.view[name] = !this.view[name];
        this.showChoices();
        act();
      }, { "aria-pressed": "false" });
      this.toggles[name] = one;
      return one;
    }

    tools() {
      this.penTools = element("span", { class: "tools own" },
        this.toggle("pen", "pen", () => this.draw()),
        button("wipe", () => {
          this.view.pen = true;
          this.change({ own: "" });
        }));
      return element("div", { class: "tools" },
        this.toggle("samples instead of data", "samples", () => this.draw()),
        this.penTools,
        button("save as JSON", () => this.write((description) => this.save(description))),
        (this.inside = button("look inside", () => this.write((description) => this.lookInside(description)), { title: "hand the flow to the playground on this page" })),
        opener((file) => this.open(file)));
    }

    showChoices() {
      const { state, view, broken } = this;
      for (const [name, input] of Object.entries(this.selects)) input.value = this.opened && name !== "data" && name !== "rate" ? "" : state[name];
      for (const [name, one] of Object.entries(this.toggles)) one.setAttribute("aria-pressed", view[name]);
      for (const [name, input] of Object.entries(this.switches)) {
        input.checked = broken.includes(name);
        input.parentElement.hidden = !FAILURES[name].fits(state);
      }
      this.besides.setAttribute("aria-pressed", state.beside);
      this.besides.hidden = !broken.length;
      this.penTools.hidden = state.data !== "own";
      this.inside.hidden = !document.querySelector("flow-playground");
      this.player.textContent = this.running ? "Pause" : "Train";
      this.player.disabled = this.stepper.disabled = this.empty || this.over;
      for (const [{ canvas }] of this.panes ?? []) {
        const frame = canvas.parentElement;
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

    // Two panes for each flow. Alone, data and latent stand side by side; two flows stand side by side, latent under data.
    layPanes() {
      const wanted = this.variants.length;
      if (this.panes?.length !== wanted) {
        this.panes = this.variants.map(() => [this.pane(true), this.pane(false)]);
        const inOrder = wanted === 1 ? this.panes[0] : [0, 1].flatMap((k) => this.panes.map((pair) => pair[k]));
        this.frame.replaceChildren(...inOrder.map(({ whole }) => whole));
      }
      this.panes.forEach(([data, latent], i) => {
        data.title.textContent = wanted === 1 ? `data: ${this.names[i]}` : this.names[i];
        latent.title.textContent = "latent";
      });
      this.showChoices();
    }

    pane(isData) {
      const canvas = element("canvas", { role: "img" });
      const title = element("p", { class: "title" });
      const frame = element("div", { class: "pane" }, canvas);
      if (isData) this.letDraw(frame, canvas);
      return { canvas, title, whole: element("div", {}, title, frame) };
    }

    // --- the pen ---

    // Points of the reader's own, by mouse, finger or pen; by keyboard the arrow keys move a place, and the space bar puts a point there.
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
        throw new Error("the library has no such thing as an affine coupling without a gain");
      }
      const address = URL.createObjectURL(new Blob([JSON.stringify(json)], { type: "application/json" }));
      element("a", { href: address, download: "flow.json" }).click();
      setTimeout(() => URL.revokeObjectURL(address), 1000);
    }

    lookInside(json) {
      const playground = document.querySelector("flow-playground");
      playground.open(new File([JSON.stringify(json)], `The flow that was trained for ${this.steps} steps`));
      playground.scrollIntoView();
    }

    // Go on with a flow from a file. A file that cannot be read changes nothing.
    async open(file) {
      try {
        this.opened = await PlaygroundFlow.read(file);
      } catch (error) {
        this.error.textContent = `${file.name} holds no flow that can be trained: ${error.message}.`;
        return;
      }
      this.error.textContent = "";
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
        const name = this.flows.length > 1 ? `${this.names[i]} ` : "";
        if (stopped) return `${name}stopped at step ${stopped.step.toLocaleString("en")}: the ${stopped.what === "loss" ? "loss" : "gradient's norm"} was no finite number`;
        return `${name}${number(nll ?? NaN)} nats`;
      });
      const entropy = this.entropy === null ? "" : `; entropy of the data ${number(this.entropy)}`;
      return `Step ${this.steps.toLocaleString("en")}. −log p of new points: ${told.join(", ")}${entropy}.`;
    }

    report() {
      this.now.textContent = this.steps ? this.summary() : FIRST_WORDS;
      const rows = [
        ["−log p of 2,000 new points, nats", ({ nll }) => number(nll)],
        ["loss, mean of the last 100 steps", ({ losses }) => (losses.length ? number(recent(losses)) : "–")],
        ["log-det, mean", ({ logDet }) => number(logDet)],
        ["latents' mean", ({ latentMean }) => latentMean.map(number).join(", ")],
        ["latents' standard deviation", ({ latentStd }) => latentStd.map(number).join(", ")],
        ["gradient's norm, last step", ({ norms }) => (norms.length ? number(norms.at(-1)) : "–")],
        ["round trip: largest error", ({ missed }) => tiny(missed)],
        ["density adds up to, in the pane", ({ mass }) => number(mass)],
      ];
      const head = element("tr", {}, element("th", {}, "after this step"), ...this.names.map((name) => element("th", { scope: "col" }, name)));
      const body = rows.map(([name, read]) => element("tr", {}, element("th", { scope: "row" }, name), ...this.flows.map((flow) => element("td", {}, read(flow)))));
      this.facts.replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
      if (this.running && performance.now() - (this.spokenAt ?? 0) > SPEAK) {
        this.say(this.summary());
      }
    }

    say(text) {
      this.spokenAt = performance.now();
      this.spoken.textContent = text;
    }

    // --- pictures ---

    draw() {
      if (!this.panes) return;
      this.panes.forEach(([data, latent], i) => {
        this.drawPane(data.canvas, this.flows[i], true);
        this.drawPane(latent.canvas, this.flows[i], false);
        const what = this.view.samples ? "samples from the flow" : "points of the data";
        data.canvas.setAttribute("aria-label", `The density of the flow (${this.names[i]}) after ${this.steps} steps, and ${what}.`);
        latent.canvas.setAttribute("aria-label", `The latents of the data after ${this.steps} steps (${this.names[i]}), on circles of the base.`);
      });
      this.drawChart(this.chart, "losses", this.limits);
      this.drawChart(this.normChart, "norms", [{ at: 5, text: "clipped at 5" }]);
    }

    drawPane(canvas, flow, isData) {
      const std = STD[this.base];
      const extent = isData ? this.extent : WIDE * std;
      const drawing = startDrawing(canvas, extent);
      if (!drawing) return;
      const { pen, width: size, colour, toPixels } = drawing;
      if (isData && flow.density) {
        pen.imageSmoothingEnabled = true;
        pen.drawImage(densityPicture(flow.density, SIDE, colour), 0, 0, size, size);
      }
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
      const shown = !isData ? flow.latents : this.view.samples ? flow.samples : flow.points;
      const n = (shown?.length ?? 0) / 2;
      for (let b = 0; b < n; b++) {
        pen.fillStyle = isData && this.view.samples ? colour("text") : hue([flow.points[b], flow.points[n + b]]);
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
    }

    // The loss or the gradient's norm against the step, of each flow: in each column of pixels the mean, and from lowest to highest
    // a band. The losses' axis shows what matters: values far above the first are drawn at the top.
    drawChart(canvas, what, limits) {
      const drawing = startDrawing(canvas);
      if (!drawing) return;
      const { pen, width, height, colour } = drawing;
      const isLoss = what === "losses";
      const [left, right, top, bottom] = [44, width - 8, 20, height - 20];
      const steps = Math.max(200, this.steps);
      const columns = this.flows.map((flow) => binned(flow[what], steps, Math.max(1, Math.floor(right - left))));
      const [low, high] = isLoss ? this.lossRange(columns.flat(), limits) : normRange(columns.flat());
      const place = (v) => bottom - ((v - low) / (high - low)) * (bottom - top); // of a loss, or of a norm's logarithm
      const scale = (value) => clamp(place(isLoss ? value : Math.log10(value)), top, bottom);
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
        pen.fillText(tick.toLocaleString("en"), left + (tick / steps) * (right - left), height - 5);
      }
      pen.textAlign = "left";
      pen.font = "600 12px sans-serif";
      pen.fillText(isLoss ? "loss (nats) against steps" : "gradient's norm", left, 12);
      // Curves, each with a name: colour alone would not tell them apart.
      columns.forEach((bins, i) => {
        this.takePen(drawing, i);
        pen.globalAlpha = 0.2;
        for (const { x, least, most } of bins) {
          if (Number.isNaN(least + most)) continue;
          const [from, to] = [scale(most), scale(Math.max(least, isLoss ? -Infinity : 1e-12))];
          pen.fillRect(left + x, from, 1, Math.max(to - from, 1));
        }
        pen.globalAlpha = 1;
        pen.beginPath();
        for (const { x, mean } of bins) if (Number.isFinite(mean)) pen.lineTo(left + x, scale(mean));
        pen.stroke();
        const { stopped } = this.flows[i];
        if (stopped) {
          pen.font = "700 15px sans-serif";
          pen.fillText("✕", left + (stopped.step / steps) * (right - left) - 6, top + 12);
        }
      });
      pen.font = "12px sans-serif";
      pen.textAlign = "right";
      if (isLoss && this.flows.length > 1) this.drawKey(drawing, right);
      this.drawLimits(drawing, limits, left, right, scale);
    }

    // From the lowest to the highest loss of the chart. The first steps, and single leaps, may leave it at the top.
    lossRange(bins, limits) {
      const lines = limits.map(({ at }) => at);
      const means = bins.map(({ mean }) => mean).filter(Number.isFinite).sort((a, b) => a - b);
      const first = Math.max(...this.flows.map((flow) => flow.losses[0] ?? 4));
      const usual = means[Math.floor(0.9 * means.length)] ?? first;
      const low = Math.min(...lines, means[0] ?? first);
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

    drawKey(drawing, right) {
      const { pen, colour } = drawing;
      this.names.forEach((name, i) => {
        const y = 34 + 16 * i;
        const end = right - pen.measureText(name).width - 8;
        this.takePen(drawing, i);
        drawRow(pen, end - 26, end, y - 4);
        pen.fillStyle = colour("text");
        pen.fillText(name, right, y);
      });
    }

    // Horizontal lines, each with its name below it, or further down where another name stands.
    drawLimits({ pen, colour }, limits, left, right, scale) {
      pen.fillStyle = colour("text");
      pen.lineJoin = "round";
      let free = 0;
      for (const { at, text } of [...limits].sort((a, b) => b.at - a.at)) {
        const y = scale(at);
        pen.strokeStyle = colour("text");
        pen.setLineDash([2, 3]);
        pen.lineWidth = 1;
        drawRow(pen, left, right, y);
        pen.setLineDash([]);
        const under = Math.max(y + 12, free);
        free = under + 13;
        pen.strokeStyle = colour("ground");
        pen.lineWidth = 4;
        pen.strokeText(text, right, under);
        pen.fillText(text, right, under);
      }
    }
  }

  // From the lowest to the highest logarithm of a norm in the chart.
  function normRange(bins) {
    const found = bins.filter(({ most }) => Number.isFinite(most));
    const low = Math.min(-1, ...found.map(({ least }) => Math.log10(least)));
    const high = Math.max(2, ...found.map(({ most }) => Math.min(Math.log10(most), 12)));
    return [Math.max(low, -3) - 0.1, high + 0.1];
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
    for (let k = 0; k < values.length; k++) {
      const x = Math.floor((k / steps) * columns);
      let bin = bins.at(-1);
      if (bin?.x !== x) bins.push((bin = { x, total: 0, count: 0, least: Infinity, most: -Infinity }));
      bin.total += values[k];
      bin.count += 1;
      bin.least = Math.min(bin.least, values[k]);
      bin.most = Math.max(bin.most, values[k]);
    }
    for (const bin of bins) bin.mean = bin.total / bin.count;
    return bins;
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

  function recent(losses) {
    const last = losses.slice(-100);
    return last.reduce((total, loss) => total + loss, 0) / last.length;
  }

  function tiny(value) {
    if (!Number.isFinite(value)) return number(value);
    return value >= 0.01 || value === 0 ? number(value) : minus(value.toExponential(0));
  }

  // A power of ten.
  function power(exponent) {
    return Math.abs(exponent) <= 3 ? String(Number((10 ** exponent).toPrecision(1))) : `1e${minus(exponent)}`;
  }

  customElements.define("flow-trainer", FlowTrainer);
}
