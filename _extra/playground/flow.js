// The playground's mathematics: a flow on vectors that nflows_lib.experiments.export.to_json wrote, run in both directions
// and layer by layer. It needs no page: tests/book/test_playground.py runs it in Node and compares it with PyTorch.
"use strict";
{
  // The one name that this file adds to the page.
  globalThis.PlaygroundFlow = class {
    static decodeHalves = decodeHalves;

    constructor(json) {
      const { dims, base, layers } = json ?? {};
      check(Number.isInteger(dims) && dims > 0, "dims is no positive integer");
      check(Array.isArray(layers) && layers.length > 0, "it has no layers");
      this.dims = dims;
      this.base = one("base", BASES, base);
      this.layers = layers.map((layer) => one("kind", KINDS, layer?.kind)(layer, dims));
    }

    // A draw of the latent.
    drawLatent() {
      return Array.from({ length: this.dims }, this.base.draw);
    }

    // Run the flow from position k, at which the vector is h, to both ends. states[i] is the vector after i layers: states[0] is
    // data and the last one latent; logDets[i] is what layer i adds to log p.
    path(h, k = 0) {
      const states = Array(this.layers.length + 1);
      const logDets = Array(this.layers.length);
      states[k] = h;
      for (let i = k; i < this.layers.length; i++) [states[i + 1], logDets[i]] = this.layers[i].forward(states[i]);
      for (let i = k - 1; i >= 0; i--) [states[i], logDets[i]] = this.layers[i].inverse(states[i + 1]);
      const logDet = sum(logDets);
      const logBase = this.base.logProb(states.at(-1));
      return { states, logDets, logDet, logBase, logProb: logBase + logDet };
    }

    // log p of the vector h after k layers, as the remaining layers give it.
    logProb(h, k = 0) {
      let logDet = 0;
      for (const layer of this.layers.slice(k)) {
        let contribution;
        [h, contribution] = layer.forward(h);
        logDet += contribution;
      }
      return this.base.logProb(h) + logDet;
    }
  };

  // Densities, and draws of one coordinate.
  const BASES = {
    normal: {
      logProb: (z) => sum(z.map((v) => -0.5 * (v * v + Math.log(2 * Math.PI)))),
      draw: () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
    },
    logistic: {
      logProb: (z) => sum(z.map((v) => -Math.abs(v) - 2 * Math.log1p(Math.exp(-Math.abs(v))))),
      draw: () => {
        const u = Math.random(); // can be 0
        return Math.log((u + 2 ** -54) / (1 - u));
      },
    },
  };

  const ACTIVATIONS = {
    relu: (v) => Math.max(v, 0),
    silu: (v) => v / (1 + Math.exp(-v)),
    tanh: Math.tanh,
  };

  const KINDS = { scaling: readScaling, additive: readCoupling, affine: readCoupling };

  // Every layer: forward(x) gives [z, log-det]; inverse(z) gives [x, the same log-det, that of forward].
  function readScaling({ log_scale: logScale }, dims) {
    check(isNumbers(logScale, dims), `log_scale is not ${dims} numbers`);
    const logDet = sum(logScale);
    return {
      kind: "scaling",
      forward: (x) => [x.map((v, i) => v * Math.exp(logScale[i])), logDet],
      inverse: (z) => [z.map((v, i) => v * Math.exp(-logScale[i])), logDet],
    };
  }

  function readCoupling({ kind, passes, gain, widths, activation, weights }, dims) {
    check(isNumbers(passes, dims) && passes.some((p) => p) && !passes.every((p) => p), `passes is no mask of ${dims}`);
    check(gain === undefined || Number.isFinite(gain), "gain is no number");
    check(Array.isArray(widths) && widths.every((width) => Number.isInteger(width) && width > 0), "widths are no sizes");
    const kept = passes.flatMap((p, i) => (p ? [i] : []));
    const changed = passes.flatMap((p, i) => (p ? [] : [i]));
    const affine = kind === "affine";
    const network = readNetwork(kept.length, widths, changed.length * (affine ? 2 : 1), activation, weights);
    // The failure "no tanh" is a coupling without a gain: its log-scale is the network's output.
    const tame = gain === undefined ? (raw) => raw : (raw) => gain * Math.tanh(raw);
    const parts = (h) => {
      const output = network(kept.map((i) => h[i]));
      const shift = affine ? output.slice(changed.length) : output;
      return { logScale: changed.map((_, j) => (affine ? tame(output[j]) : 0)), shift };
    };
    return {
      kind,
      changed,
      forward(x) {
        const { logScale, shift } = parts(x);
        const z = [...x];
        changed.forEach((i, j) => (z[i] = x[i] * Math.exp(logScale[j]) + shift[j]));
        return [z, sum(logScale)];
      },
      inverse(z) {
        const { logScale, shift } = parts(z);
        const x = [...z];
        changed.forEach((i, j) => (x[i] = (z[i] - shift[j]) * Math.exp(-logScale[j])));
        return [x, sum(logScale)];
      },
    };
  }

  function readNetwork(inputs, widths, outputs, activation, weights) {
    const bend = one("activation", ACTIVATIONS, activation);
    const values = decodeHalves(weights);
    let start = 0;
    const take = (n) => values.subarray(start, (start += n));
    const layers = [...widths, outputs].map((width, i) => {
      const columns = i ? widths[i - 1] : inputs;
      return { columns, matrix: take(width * columns), bias: take(width) };
    });
    check(start === values.length, `weights are ${values.length} numbers, not ${start}`);
    return (h) => {
      layers.forEach(({ columns, matrix, bias }, i) => {
        const next = Array(bias.length);
        for (let row = 0; row < bias.length; row++) {
          let total = bias[row];
          for (let column = 0; column < columns; column++) total += matrix[row * columns + column] * h[column];
          next[row] = i < layers.length - 1 ? bend(total) : total;
        }
        h = next;
      });
      return h;
    };
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

  function one(name, table, key) {
    check(typeof key === "string" && Object.hasOwn(table, key), `${name} is none of ${Object.keys(table).join(", ")}`);
    return table[key];
  }

  function isNumbers(values, n) {
    return Array.isArray(values) && values.length === n && values.every(Number.isFinite);
  }

  function sum(values) {
    return values.reduce((total, v) => total + v, 0);
  }

  function check(holds, complaint) {
    if (!holds) throw new Error(complaint);
  }
}
