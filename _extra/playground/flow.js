// A flow on vectors as nflows_lib.experiments.export writes it: read, checked, run layer by layer (by train.js), and written. It
// needs no page: tests/book/test_playground.py runs it in Node and compares it with PyTorch.
"use strict";
{
const { TrainableFlow, Random, BASES, ACTIVATIONS } = PlaygroundTraining;
const KINDS = { scaling: checkScaling, additive: checkCoupling, affine: checkCoupling };

// The one name that this file adds to the page.
globalThis.PlaygroundFlow = class PlaygroundFlow {
  static decodeHalves = decodeHalves;

  constructor(json) {
    const description = PlaygroundFlow.decode(json);
    this.dims = description.dims;
    this.flow = new TrainableFlow(description);
    this.layers = this.flow.layers;
    this.random = new Random(Math.floor(2 ** 32 * Math.random()));
  }

  // The description that train.js takes: with plain numbers as weights. Complains of what is no flow.
  static decode(json) {
    const { dims, base, layers } = json ?? {};
    check(Number.isInteger(dims) && dims > 0, "dims is no positive integer");
    check(Array.isArray(layers) && layers.length > 0, "it has no layers");
    checkOne("base", BASES, base);
    return {
      dims,
      base,
      layers: layers.map((layer) => {
        checkOne("kind", KINDS, layer?.kind);
        const plain = layer.weights === undefined ? layer : { ...layer, weights: Array.from(decodeHalves(layer.weights)) };
        KINDS[layer.kind](plain, dims);
        return plain;
      }),
    };
  }

  // The flow on the plane that is in a file: its name, its JSON, and its description. If there is none, the alert says why.
  static async read(file, purpose, alert) {
    try {
      const json = JSON.parse(await file.text());
      const description = PlaygroundFlow.decode(json);
      check(json.dims === 2, `expected points in the plane, got ${json.dims} dimensions`);
      return { name: file.name, json, description };
    } catch (error) {
      alert.textContent = `${file.name} holds no flow that can be ${purpose}: ${error.message}.`;
      return null;
    }
  }

  // The description of a flow as JSON, with weights rounded to float16. Complains of what the library cannot read.
  static encode({ dims, base, layers }) {
    const rounded = (v) => Number(v.toFixed(5));
    const written = layers.map((layer) => {
      checkOne("kind", KINDS, layer.kind);
      KINDS[layer.kind](layer, dims);
      if (layer.kind === "scaling") return { ...layer, log_scale: layer.log_scale.map(rounded) };
      return { ...layer, ...(layer.gain !== undefined && { gain: rounded(layer.gain) }), weights: encodeHalves(layer.weights) };
    });
    return { dims, base, layers: written };
  }

  // A draw of the latent.
  drawLatent() {
    return Array.from({ length: this.dims }, () => BASES[this.flow.base].draw(this.random));
  }

  // From the vector h after k layers to both ends: states[i] is the vector after i layers, from data to latent, and logDets[i] is
  // what layer i adds to log p.
  path(h, k = 0) {
    return this.paths([h], k)[0];
  }

  // The same for many vectors at once.
  paths(vectors, k = 0) {
    const n = vectors.length;
    const states = Array(this.layers.length + 1);
    states[k] = Float64Array.from({ length: this.dims * n }, (_, at) => vectors[at % n][Math.floor(at / n)]);
    for (let i = k - 1; i >= 0; i--) {
      states[i] = states[i + 1].slice();
      this.layers[i].inverse(states[i], n);
    }
    const logDets = this.layers.map((layer, i) => {
      const [next, logDet] = [new Float64Array(this.dims * n), new Float64Array(n)];
      layer.forward(states[i], next, logDet, n);
      states[i + 1] ??= next;
      return logDet;
    });
    return vectors.map((_, b) => {
      const own = logDets.map((values) => values[b]);
      const logDet = own.reduce((total, v) => total + v, 0);
      const logBase = this.flow.logBase(states.at(-1), b, n);
      const ownStates = states.map((state) => Array.from({ length: this.dims }, (_, i) => state[i * n + b]));
      return { states: ownStates, logDets: own, logDet, logBase, logProb: logBase + logDet };
    });
  }
};

// Each check complains unless a layer's description is whole.
function checkScaling({ log_scale: logScale }, dims) {
  check(isNumbers(logScale, dims), `log_scale is not ${dims} numbers`);
}

function checkCoupling({ kind, passes, gain, widths, activation, weights }, dims) {
  check(isNumbers(passes, dims) && passes.some((p) => p) && !passes.every((p) => p), `passes is no mask of ${dims}`);
  check(gain === undefined || Number.isFinite(gain), "gain is no number");
  check(Array.isArray(widths) && widths.every((width) => Number.isInteger(width) && width > 0), "widths are no sizes");
  checkOne("activation", ACTIVATIONS, activation);
  const kept = passes.filter((p) => p).length;
  const sizes = [kept, ...widths, (dims - kept) * (kind === "affine" ? 2 : 1)];
  const needed = sizes.slice(1).reduce((total, outputs, k) => total + (sizes[k] + 1) * outputs, 0);
  check(Array.isArray(weights), "it has no weights");
  check(weights.length === needed, `weights are ${weights.length} numbers, not ${needed}`);
  check(weights.every(Number.isFinite), "a weight is no finite number");
}

// Base64 of little-endian float16 numbers: 1 bit sign, 5 bits exponent, 10 bits fraction.
function decodeHalves(text) {
  check(typeof text === "string" && /^[A-Za-z0-9+/]*={0,2}$/.test(text) && text.length % 4 === 0, "weights are not in base64");
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Float64Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = bytes[2 * i] | (bytes[2 * i + 1] << 8);
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 0x1f;
    const fraction = (bits & 0x3ff) / 1024;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  });
}

function encodeHalves(values) {
  const even = (v) => (v % 1 === 0.5 ? 2 * Math.round(v / 2) : Math.round(v));
  const bytes = values.flatMap((v) => {
    const size = Math.abs(v);
    check(size < 65520, `a weight of ${v} is too large for float16`);
    let exponent = Math.max(Math.floor(Math.log2(size)), -14);
    while (exponent > -14 && 2 ** exponent > size) exponent -= 1; // where the logarithm was rounded up
    const steps = even((size / 2 ** exponent) * 1024); // 1024 to 2048 steps of 2^(exponent - 10); fewer if subnormal
    const bits = ((exponent + 14) << 10) + steps + (v < 0 ? 0x8000 : 0);
    return [bits & 255, bits >> 8];
  });
  return btoa(String.fromCharCode(...bytes));
}

function checkOne(name, table, key) {
  check(typeof key === "string" && Object.hasOwn(table, key), `${name} is none of ${Object.keys(table).join(", ")}`);
}

function isNumbers(values, n) {
  return Array.isArray(values) && values.length === n && values.every(Number.isFinite);
}

function check(holds, complaint) {
  if (!holds) throw new Error(complaint);
}
}
