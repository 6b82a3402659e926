// The mathematics of <flow-trainer>: data sets of known density, flows with hand-written backward passes, Adam, and runs on the
// same batches. It is one function, whose text also goes to a worker, since a page that was opened from a file may not load a
// worker's script. It needs no page: tests/book/test_playground_training.py runs it in Node and compares it with PyTorch.
//
// A batch of B vectors is a Float64Array in which each coordinate's values lie together: coordinate i of vector b is at i * B + b.

// The one name that this file adds to the page.
globalThis.PlaygroundTraining = (function mathematics() {
"use strict";
const { PI, abs, ceil, cos, exp, floor, log, log1p, max, min, sin, sqrt, tanh } = Math;
const LOG_2PI = log(2 * PI);

// --- random numbers ---

// Uniform and normal draws that repeat for the same seed (Bob Jenkins's small fast counter, sfc32).
class Random {
  constructor(seed) {
    this.state = Uint32Array.of(0x9e3779b9, 0x243f6a88, seed, 1);
    for (let i = 0; i < 16; i++) this.uniform();
  }

  // In [0, 1).
  uniform() {
    const s = this.state;
    const drawn = (s[0] + s[1] + s[3]) >>> 0;
    s[3] += 1;
    s[0] = s[1] ^ (s[1] >>> 9);
    s[1] = s[2] + (s[2] << 3);
    s[2] = ((s[2] << 21) | (s[2] >>> 11)) + drawn;
    return drawn / 2 ** 32;
  }

  normal() {
    return sqrt(-2 * log(1 - this.uniform())) * cos(2 * PI * this.uniform());
  }
}

// --- bases ---

// Per coordinate: log-density in nats, its derivative, and a draw.
const BASES = {
  normal: {
    logProb: (z) => -0.5 * (z * z + LOG_2PI),
    slope: (z) => -z,
    draw: (random) => random.normal(),
  },
  logistic: {
    logProb: (z) => -abs(z) - 2 * log1p(exp(-abs(z))),
    slope: (z) => -tanh(z / 2),
    draw: (random) => {
      const u = random.uniform(); // can be 0
      return log((u + 2 ** -54) / (1 - u));
    },
  },
};

// --- data ---

const OWN_STD = 0.15; // of the noise around points that a reader drew
const SHARES = [6, 2, 3, 5]; // of 16: how often a pair of black and white pixels is (0, 0), (1, 0), (0, 1) and (1, 1)

const curve = (n, at) => Array.from({ length: n }, (_, i) => at((i + 0.5) / n));
const circle = (radius) => curve(160, (t) => [radius * cos(2 * PI * t), radius * sin(2 * PI * t)]);
// Each set is a mixture of round Gaussians with equal weights, so its density is known exactly: means and one std.
const MIXTURES = {
  gaussians: { means: [[-2, 0], [2, 0]], std: 0.5 },
  moons: {
    means: curve(128, (t) => [1.5 * cos(PI * t) - 0.75, 1.5 * sin(PI * t) - 0.375]).flatMap(
      ([a, b]) => [[a, b], [-a, -b]],
    ),
    std: 0.075,
  },
  circles: { means: [...circle(2.5), ...circle(1.25)], std: 0.1 },
  spiral: {
    means: curve(256, (t) => {
      const angle = 1.5 * PI * (1 + 2 * t);
      return [(angle * cos(angle)) / 5, (angle * sin(angle)) / 5];
    }),
    std: 0.06,
  },
};

// A set of points: the name of a mixture, "numbers", or "own" with the points that a reader drew.
function makeData(name, own = []) {
  if (name === "numbers") return wholeNumbers();
  return mixture(name === "own" ? { means: own, std: OWN_STD } : MIXTURES[name]);
}

// n vectors, each of which is one of the centres and noise.
function drawAround(centres, noise, random, n) {
  const x = new Float64Array(2 * n);
  for (let b = 0; b < n; b++) {
    const centre = centres[floor(random.uniform() * centres.length)];
    for (let i = 0; i < 2; i++) x[i * n + b] = centre[i] + noise();
  }
  return x;
}

function mixture({ means, std }) {
  return {
    draw: (random, n) => drawAround(means, () => std * random.normal(), random, n),
    // The density at the centres of square cells that cover it, and the area of a cell.
    onGrid() {
      const side = std / 3;
      const reach = 5.5 * std;
      const axes = [0, 1].map((i) => {
        const centres = means.map((mean) => mean[i]);
        const start = min(...centres) - reach;
        return { start, count: ceil((max(...centres) + reach - start) / side) };
      });
      const density = new Float64Array(axes[0].count * axes[1].count);
      const weight = 1 / (2 * PI * std * std * means.length);
      // A Gaussian is a product of one factor per coordinate, and beyond the reach it counts as 0.
      for (const mean of means) {
        const [rows, columns] = axes.map(({ start }, i) => {
          const first = floor((mean[i] - reach - start) / side);
          const last = ceil((mean[i] + reach - start) / side);
          const values = [];
          for (let k = first; k < last; k++) values.push(exp(-0.5 * ((start + (k + 0.5) * side - mean[i]) / std) ** 2));
          return { first, values };
        });
        rows.values.forEach((p, a) => {
          const at = (rows.first + a) * axes[1].count + columns.first;
          columns.values.forEach((q, c) => (density[at + c] += weight * p * q));
        });
      }
      return { density, area: side * side };
    },
  };
}

// Pairs of whole numbers from 0 to 1, with uniform noise in [0, 1), moved so that 0 is in the middle.
function wholeNumbers() {
  const pairs = SHARES.flatMap((share, k) => Array(share).fill([(k % 2) - 1, floor(k / 2) - 1]));
  return {
    draw: (random, n) => drawAround(pairs, () => random.uniform(), random, n),
    onGrid: () => ({ density: Float64Array.from(SHARES, (share) => share / 16), area: 1 }),
  };
}

// What two failures make of a batch: a column twice, or numbers without their noise, each in the middle of its cell.
function spoil(x, n, failures) {
  if (!failures.includes("column") && !failures.includes("noise")) return x;
  return x.map((v, at) => (failures.includes("column") ? x[at % n] : floor(v) + 0.5));
}

// The entropy of the data in nats, which is the lowest mean of -log p that any model has on them.
function entropyOf(data) {
  const { density, area } = data.onGrid();
  return -density.reduce((total, p) => (p > 0 ? total + p * log(p) * area : total), 0);
}

// The lowest mean of -log p, in nats, of a model p(x) = base(f(x)) whose f keeps volume. The best f takes every superlevel set of
// the data's density to the superlevel set of the base that has the same volume. So both densities are sorted, and
// where the volume is the same, the data's density meets the base's.
function volumePreservingOptimum(data, base) {
  const { density, area } = data.onGrid();
  const cells = density.filter((p) => p > 0).sort().reverse();
  const model = superlevel(base, cells.length * area);
  return -cells.reduce((total, p, rank) => total + p * area * model(rank * area, (rank + 1) * area), 0);
}

// The base's log-density in the plane, averaged over the points whose superlevel sets have volumes from a to b.
function superlevel(base, volume) {
  if (base === "normal") return (a, b) => -LOG_2PI - (a + b) / (4 * PI); // discs: volume pi r^2
  const side = min(0.04, sqrt(volume) / 60);
  const reach = 3 + sqrt(volume); // the set is smaller than the square whose corners are on the axes
  const values = [];
  for (let z1 = -reach + side / 2; z1 < reach; z1 += side) values.push(BASES[base].logProb(z1));
  const cells = new Float64Array(values.length ** 2);
  values.forEach((p, i) => values.forEach((q, j) => (cells[i * values.length + j] = p + q)));
  cells.sort().reverse();
  const sums = new Float64Array(cells.length + 1);
  cells.forEach((value, i) => (sums[i + 1] = sums[i] + value));
  const until = (v) => {
    const at = min(v / side ** 2, cells.length - 1);
    const whole = floor(at);
    return sums[whole] + (at - whole) * cells[whole];
  };
  return (a, b) => (until(b) - until(a)) / ((b - a) / side ** 2);
}

// --- networks and layers ---

// Each turns a number into its value, and writes its derivative to a place among the slopes.
const ACTIVATIONS = {
  relu(h, slopes, at) {
    slopes[at] = h > 0 ? 1 : 0;
    return h * slopes[at];
  },
  silu(h, slopes, at) {
    const gate = 1 / (1 + exp(-h));
    slopes[at] = gate * (1 + h * (1 - gate));
    return h * gate;
  },
  tanh(h, slopes, at) {
    const value = tanh(h);
    slopes[at] = 1 - value * value;
    return value;
  },
};

// An array of at least n numbers: the old one if it is long enough.
const room = (old, n) => (old?.length >= n ? old : new Float64Array(n));
// The values of coordinate i of n vectors.
const coordinate = (x, i, n) => x.subarray(i * n, (i + 1) * n);
// B of n vectors, from one of them on.
const some = (x, n, from, B) => Float64Array.from({ length: (x.length / n) * B }, (_, at) => x[floor(at / B) * n + from + (at % B)]);
const sum = (values) => values.reduce((total, v) => total + v, 0);
const mean = (values) => sum(values) / values.length;
const deviation = (values, middle = mean(values)) => sqrt(mean(values.map((v) => (v - middle) ** 2)));

// A fully connected network. take(n) gives the next n parameters, as views of values and of gradients.
function makeNetwork(sizes, activation, take) {
  const bend = ACTIVATIONS[activation];
  // Each layer also keeps what its backward pass needs: its input, output and slopes.
  const layers = sizes.slice(1).map((outputs, k) => ({ inputs: sizes[k], outputs, weight: take(sizes[k] * outputs), bias: take(outputs) }));
  const last = layers.at(-1);
  return {
    parameters: layers.flatMap(({ weight, bias }) => [weight, bias]),
    forward(input, B) {
      for (const layer of layers) {
        const { inputs, outputs, weight, bias } = layer;
        const output = (layer.output = room(layer.output, outputs * B));
        layer.input = input;
        for (let j = 0; j < outputs; j++) {
          output.fill(bias.values[j], j * B, (j + 1) * B);
          for (let i = 0; i < inputs; i++) {
            const w = weight.values[j * inputs + i];
            for (let b = 0; b < B; b++) output[j * B + b] += w * input[i * B + b];
          }
        }
        if (layer !== last) {
          layer.slopes = room(layer.slopes, outputs * B);
          for (let at = 0; at < outputs * B; at++) output[at] = bend(output[at], layer.slopes, at);
        }
        input = output;
      }
      return input;
    },
    // From the loss's derivatives by the output to those by the input; adds up those by the parameters.
    backward(byOutput, B) {
      for (const layer of [...layers].reverse()) {
        const { inputs, outputs, weight, bias, input, slopes } = layer;
        const byInput = (layer.byInput = room(layer.byInput, inputs * B));
        byInput.fill(0, 0, inputs * B);
        if (layer !== last) for (let at = 0; at < outputs * B; at++) byOutput[at] *= slopes[at];
        for (let j = 0; j < outputs; j++) {
          let total = 0;
          for (let b = 0; b < B; b++) total += byOutput[j * B + b];
          bias.gradients[j] += total;
          for (let i = 0; i < inputs; i++) {
            const w = weight.values[j * inputs + i];
            let product = 0;
            for (let b = 0; b < B; b++) {
              const d = byOutput[j * B + b];
              product += d * input[i * B + b];
              byInput[i * B + b] += w * d;
            }
            weight.gradients[j * inputs + i] += product;
          }
        }
        byOutput = byInput;
      }
      return byOutput;
    },
  };
}

// Every layer: forward(x, z, logDet, B) writes z and adds to each example's log-det; backward(d, byLogDet, x, B) turns d, the
// loss's derivatives by z, into those by x, where byLogDet is the derivative by each example's log-det; inverse(z, B) turns z into x.
function makeScaling({ log_scale: start }, dims, take) {
  const { values, gradients } = take(dims);
  values.set(start);
  return {
    kind: "scaling",
    forward(x, z, logDet, B) {
      for (let at = 0; at < dims * B; at++) {
        const logScale = values[floor(at / B)];
        z[at] = x[at] * exp(logScale);
        logDet[at % B] += logScale;
      }
    },
    backward(d, byLogDet, x, B) {
      for (let at = 0; at < dims * B; at++) {
        const i = floor(at / B);
        d[at] *= exp(values[i]);
        gradients[i] += d[at] * x[at] + byLogDet;
      }
    },
    inverse(z, B) {
      for (let at = 0; at < dims * B; at++) z[at] *= exp(-values[floor(at / B)]);
    },
    write: () => ({ kind: "scaling", log_scale: [...values] }),
  };
}

// The kinds: "affine", with a gain unless the tanh is left out; "additive", an affine coupling whose log-scale is 0; "unmasked",
// an additive coupling whose network's output is not masked, so that it also shifts the half that the network reads (F3).
function makeCoupling({ kind, passes, gain, widths, activation, weights }, dims, take) {
  const places = passes.map((_, i) => i);
  const kept = places.filter((i) => passes[i]);
  const changed = places.filter((i) => kind === "unmasked" || !passes[i]);
  const affine = kind === "affine";
  const n = changed.length;
  const tame = affine && gain !== undefined ? take(1) : null;
  if (tame) tame.values[0] = gain;
  const network = makeNetwork([kept.length, ...widths, affine ? 2 * n : n], activation, take);
  let start = 0;
  for (const { values } of network.parameters) {
    values.set(weights.slice(start, start + values.length));
    start += values.length;
  }
  const own = {};
  // The network's output, and from it tanh's values, log-scales, scale factors and shifts of the changed coordinates.
  const run = (x, B) => {
    own.seen = room(own.seen, kept.length * B);
    kept.forEach((i, k) => own.seen.set(coordinate(x, i, B), k * B));
    const output = network.forward(own.seen, B);
    for (const name of ["bent", "logScale", "factor"]) own[name] = room(own[name], n * B);
    for (let at = 0; at < n * B; at++) {
      own.bent[at] = tame ? tanh(output[at]) : output[at];
      own.logScale[at] = affine ? own.bent[at] * (tame ? tame.values[0] : 1) : 0;
      own.factor[at] = exp(own.logScale[at]);
    }
    own.shift = affine ? output.subarray(n * B) : output;
  };
  // Call act for each number that changes: with its place among all numbers of B vectors, and among those that change.
  const each = (B, act) => changed.forEach((i, k) => {
    for (let b = 0; b < B; b++) act(i * B + b, k * B + b);
  });
  return {
    kind,
    changed,
    forward(x, z, logDet, B) {
      run(x, B);
      z.set(x.subarray(0, dims * B));
      each(B, (at, k) => {
        z[at] = x[at] * own.factor[k] + own.shift[k];
        logDet[k % B] += own.logScale[k];
      });
    },
    backward(d, byLogDet, x, B) {
      const byOutput = (own.byOutput = room(own.byOutput, (affine ? 2 : 1) * n * B));
      each(B, (at, k) => {
        const dz = d[at];
        byOutput[affine ? n * B + k : k] = dz;
        d[at] = dz * own.factor[k];
        if (!affine) return;
        const byLogScale = dz * x[at] * own.factor[k] + byLogDet;
        if (tame) tame.gradients[0] += byLogScale * own.bent[k];
        byOutput[k] = tame ? byLogScale * tame.values[0] * (1 - own.bent[k] ** 2) : byLogScale;
      });
      const bySeen = network.backward(byOutput, B);
      kept.forEach((i, k) => {
        for (let b = 0; b < B; b++) d[i * B + b] += bySeen[k * B + b];
      });
    },
    inverse(z, B) {
      run(z, B);
      each(B, (at, k) => (z[at] = (z[at] - own.shift[k]) / own.factor[k]));
    },
    write: () => ({
      kind, passes, ...(tame && { gain: tame.values[0] }), widths, activation,
      weights: network.parameters.flatMap(({ values }) => [...values]),
    }),
  };
}

const KINDS = { scaling: makeScaling, additive: makeCoupling, affine: makeCoupling, unmasked: makeCoupling };

// --- a flow ---

// A flow that can be trained. Its description is the JSON of nflows_lib.experiments.export with plain numbers as weights.
class TrainableFlow {
  constructor({ dims, base, layers }) {
    this.dims = dims;
    this.base = base;
    const blocks = [];
    const take = (n) => {
      blocks.push({ values: new Float64Array(n), gradients: new Float64Array(n) });
      return blocks.at(-1);
    };
    this.layers = layers.map((layer) => KINDS[layer.kind](layer, dims, take));
    this.parameters = blocks; // in the order of the layers; a coupling's gain comes before its network
    this.states = [];
  }

  write() {
    return { dims: this.dims, base: this.base, layers: this.layers.map((layer) => layer.write()) };
  }

  // The latents of B vectors that have passed some layers, and their log-dets, in arrays that the next call overwrites.
  forward(x, B, passed = 0) {
    this.logDet = room(this.logDet, B);
    this.logDet.fill(0, 0, B);
    for (let k = passed; k < this.layers.length; k++) {
      const z = (this.states[k] = room(this.states[k], this.dims * B));
      this.layers[k].forward(x, z, this.logDet, B);
      x = z;
    }
    return x;
  }

  logBase(z, b, B) {
    let total = 0;
    for (let i = 0; i < this.dims; i++) total += BASES[this.base].logProb(z[i * B + b]);
    return total;
  }

  // log p, latents and log-dets of n vectors, in batches that stay in the processor's cache.
  logProb(x, n, passed = 0) {
    const found = { logProb: new Float64Array(n), latent: new Float64Array(this.dims * n), logDet: new Float64Array(n) };
    for (let from = 0; from < n; from += BATCH) {
      const B = min(BATCH, n - from);
      const z = this.forward(some(x, n, from, B), B, passed);
      for (let b = 0; b < B; b++) {
        found.logProb[from + b] = this.logBase(z, b, B) + this.logDet[b];
        found.logDet[from + b] = this.logDet[b];
        for (let i = 0; i < this.dims; i++) found.latent[i * n + from + b] = z[i * B + b];
      }
    }
    return found;
  }

  // The density of what has passed some layers, in the plane from -extent to extent, at the centres of side times side cells, row by
  // row from the top.
  density(extent, side, passed = 0) {
    const n = side * side;
    const place = (k) => extent * ((2 * (k + 0.5)) / side - 1);
    const cells = new Float64Array(2 * n);
    for (let at = 0; at < n; at++) {
      cells[at] = place(at % side);
      cells[n + at] = -place(floor(at / side));
    }
    return this.logProb(cells, n, passed).logProb.map(exp);
  }

  inverse(z, B) {
    const x = z.slice(0, this.dims * B);
    for (const layer of [...this.layers].reverse()) layer.inverse(x, B);
    return x;
  }

  // The loss in nats, and its derivatives as gradients. It is the mean of -(log base + share * log-det): with a share of 1 the
  // negative log-likelihood, with 0 or -1 the failure F27.
  lossAndGradient(x, B, share = 1) {
    for (const { gradients } of this.parameters) gradients.fill(0);
    const z = this.forward(x, B);
    const d = (this.d = room(this.d, this.dims * B));
    let loss = 0;
    for (let b = 0; b < B; b++) loss -= (this.logBase(z, b, B) + (share && share * this.logDet[b])) / B;
    const { slope } = BASES[this.base];
    for (let at = 0; at < this.dims * B; at++) d[at] = -slope(z[at]) / B;
    for (let k = this.layers.length - 1; k >= 0; k--) this.layers[k].backward(d, -share / B, k ? this.states[k - 1] : x, B);
    return loss;
  }
}

// Adam with PyTorch's defaults, and clipping as torch.nn.utils.clip_grad_norm_ does it.
class Adam {
  constructor(parameters, rate, clip = null) {
    Object.assign(this, { parameters, rate, clip, steps: 0 });
    this.moments = parameters.map(({ values }) => [0, 1].map(() => new Float64Array(values.length)));
  }

  gradientNorm() {
    let total = 0;
    for (const { gradients } of this.parameters) for (const g of gradients) total += g * g;
    return sqrt(total);
  }

  step(norm = this.gradientNorm()) {
    this.steps += 1;
    const shrink = this.clip === null ? 1 : min(1, this.clip / (norm + 1e-6));
    const [first, second] = [1 - 0.9 ** this.steps, 1 - 0.999 ** this.steps];
    this.parameters.forEach(({ values, gradients }, p) => {
      const [m, v] = this.moments[p];
      for (let i = 0; i < values.length; i++) {
        const g = gradients[i] * shrink;
        m[i] += 0.1 * (g - m[i]);
        v[i] += 0.001 * (g * g - v[i]);
        values[i] -= (this.rate * (m[i] / first)) / (sqrt(v[i] / second) + 1e-8);
      }
    });
  }
}

// --- what a reader chooses ---

const BATCH = 256;
const FRESH = 2000; // points that no step sees, on which -log p is measured
const SHOWN = 300;
const CLIP = 5;
const FASTER = 30; // the failure "rate": so many times the rate

// A new flow on the plane, as a description. The failures are names of what is broken.
function describeFlow({ model, base, couplings, width }, failures, random) {
  const broken = (name) => failures.includes(name);
  const affine = model === "realnvp";
  const kind = affine ? "affine" : broken("mask") ? "unmasked" : "additive";
  const outputs = kind === "additive" ? 1 : 2;
  const layers = Array.from({ length: couplings }, (_, i) => {
    const first = broken("alternation") ? 0 : i % 2;
    // The first layer as PyTorch draws it, times 3, which spreads the bends of few units over the data. The last is zero.
    const weights = Array.from({ length: 2 * width }, () => 3 * (2 * random.uniform() - 1));
    weights.push(...Array(outputs * (width + 1)).fill(0));
    return { kind, passes: first ? [0, 1] : [1, 0], ...(affine && !broken("tanh") && { gain: 1 }), widths: [width], activation: "silu", weights };
  });
  if (!affine && !broken("scaling")) layers.push({ kind: "scaling", log_scale: [0, 0] });
  return { dims: 2, base, layers };
}

// The flows of one page, trained on the same batches from the same first weights: each with its failures.
class Session {
  // choices: data, own (points that the reader drew), model, base, couplings, width, rate, seed; variants: for each flow a list of
  // failures; description: of a flow to go on with.
  constructor(choices, variants, description = null) {
    this.data = makeData(choices.data, choices.own);
    this.random = new Random(2 * choices.seed + 1);
    const other = new Random(2 * choices.seed);
    this.fresh = this.data.draw(other, FRESH);
    this.noise = Float64Array.from({ length: 2 * SHOWN }, () => BASES[choices.base].draw(other));
    const start = other.state.slice();
    this.steps = 0;
    this.runs = variants.map((failures) => {
      other.state.set(start);
      const flow = new TrainableFlow(description ?? describeFlow(choices, failures, other));
      const rate = choices.rate * (failures.includes("rate") ? FASTER : 1);
      const clip = failures.includes("clipping") ? null : CLIP;
      const share = failures.includes("sign") ? -1 : failures.includes("logdet") ? 0 : 1;
      return { failures, flow, adam: new Adam(flow.parameters, rate, clip), share, losses: [], norms: [], stopped: null };
    });
  }

  get over() {
    return this.runs.every(({ stopped }) => stopped);
  }

  step() {
    const batch = this.data.draw(this.random, BATCH);
    this.steps += 1;
    for (const run of this.runs) {
      if (run.stopped) continue;
      const loss = run.flow.lossAndGradient(spoil(batch, BATCH, run.failures), BATCH, run.share);
      const norm = run.adam.gradientNorm();
      run.losses.push(loss);
      run.norms.push(norm);
      if (Number.isFinite(loss) && Number.isFinite(norm)) run.adam.step(norm);
      else run.stopped = { step: this.steps, what: Number.isFinite(loss) ? "norm" : "loss" };
    }
  }

  // What the page shows of each flow: losses and norms since the last picture, its density (as above), points and latents, noise and
  // samples, and numbers.
  picture(extent, side) {
    return {
      steps: this.steps,
      flows: this.runs.map(({ flow, failures, losses, norms, stopped }) => {
        const points = spoil(this.fresh, FRESH, failures);
        const { logProb, latent, logDet } = flow.logProb(points, FRESH);
        const density = flow.density(extent, side);
        const back = flow.inverse(latent, FRESH);
        const latents = [0, 1].map((i) => coordinate(latent, i, FRESH));
        return {
          losses: losses.splice(0),
          norms: norms.splice(0),
          stopped,
          density,
          points: some(points, FRESH, 0, SHOWN),
          latents: some(latent, FRESH, 0, SHOWN),
          noise: this.noise,
          samples: flow.inverse(this.noise, SHOWN),
          nll: -mean(logProb),
          logDet: mean(logDet),
          latentMean: latents.map(mean),
          latentStd: latents.map((values) => deviation(values)),
          mass: sum(density) * ((2 * extent) / side) ** 2,
          missed: points.reduce((most, v, at) => max(most, abs(back[at] - v)), 0),
        };
      }),
    };
  }
}

// --- the worker ---

// What a worker does with a page's messages: { begin: [choices, variants, description], id, extent, side, every }, { pace }, { steps },
// { seen } after each picture that the page has drawn, { write } for the description of one of its flows.
const serve = () => {
  const SLICE = 25; // milliseconds of training between two looks at the page's messages
  const SLOW = 100; // milliseconds between steps at the slow pace
  let session = null;
  let view = {};
  let pace = "stop"; // or "slow" or "full"
  let waiting = false; // for the page to have drawn the last picture
  let due = 0;
  const { port1, port2 } = new MessageChannel(); // a timer would wait 4 ms
  let turning = false;

  const show = () => {
    waiting = true;
    due = performance.now() + view.every;
    postMessage({ id: view.id, picture: session.picture(view.extent, view.side), over: session.over });
  };
  const again = () => {
    if (turning || pace === "stop") return;
    turning = true;
    if (pace === "slow") setTimeout(() => port2.postMessage(0), SLOW);
    else port2.postMessage(0);
  };
  port1.onmessage = () => {
    turning = false;
    if (pace === "stop" || !session) return;
    const until = performance.now() + SLICE;
    do session.step();
    while (pace === "full" && !session.over && performance.now() < until);
    if (session.over) pace = "stop";
    if (session.over || (!waiting && performance.now() >= due)) show();
    again();
  };
  onmessage = ({ data }) => {
    if (data.begin) {
      session = new Session(...data.begin);
      view = data;
      pace = "stop";
      show();
    }
    if (data.pace) {
      pace = data.pace;
      again();
      if (pace === "stop") show();
    }
    if (data.steps) {
      for (let i = 0; i < data.steps; i++) session.step();
      show();
    }
    if (data.seen) waiting = false;
    if (data.write !== undefined) postMessage({ written: session.runs[data.write].flow.write() });
  };
};

function startWorker() {
  const address = URL.createObjectURL(new Blob([`(${mathematics})().serve();`], { type: "text/javascript" }));
  const worker = new Worker(address);
  URL.revokeObjectURL(address);
  return worker;
}

return {
  BASES, ACTIVATIONS, Random, TrainableFlow, Adam, Session, makeData, entropyOf, volumePreservingOptimum, mean, serve,
  startWorker,
};
})();
