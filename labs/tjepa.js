/*
 * tjepa.py in JavaScript: the same names, the same order, one text at a time and no gradients.
 *
 * A sequence (T, C) is a list of T Float32Arrays. `weights` maps the names of the state dict of
 * PyTorch to {data, shape}; `cfg` is the Config of the run. Sums are made in double precision.
 */
"use strict";

// -- data/tokenizer.py and data/typed.py ----------------------------------------------------------

// Blanks as Python's str.split sees them.
const BLANKS = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;

/** A question as it is encoded: straight quotes, single blanks, no mark at its end. */
function plain(question) {
  question = question.normalize("NFC").replace(/[\u2018\u2019]/g, "'");
  question = question.replace(/[\u201c\u201d]/g, '"').split(BLANKS).filter(Boolean).join(" ");
  return question.replace(/[ ?!.]+$/, "") || question;
}

/** Byte-level BPE; a token is kept as a string of its bytes. */
class Tokenizer {
  constructor({ranks, pattern}) {
    this.ranks = ranks.map(atob);
    this.table = new Map(this.ranks.map((token, i) => [token, i]));
    // JavaScript has no possessive quantifiers; at the end of an alternative they change nothing.
    this.pattern = new RegExp(pattern.replace(/([+}])\+/g, "$1"), "gu");
  }

  encode(text) {
    const bytes = piece => String.fromCharCode(...new TextEncoder().encode(piece));
    return (text.match(this.pattern) ?? []).flatMap(piece => this.merge(bytes(piece)));
  }

  /** Ids of a question, each word in its usual case. */
  encode_question(question) {
    const words = /[^\p{L}\p{M}][\p{L}\p{M}]+/gu;
    return this.encode((" " + plain(question)).replace(words, word => this.usual_case(word)));
  }

  /** A word in the case that takes the fewest tokens: as it is, lower, upper, or one capital. */
  usual_case(word) {
    const [before, first, ...rest] = word;
    const one = before + first.toUpperCase() + rest.join("").toLowerCase();
    const forms = [word, word.toLowerCase(), word.toUpperCase(), one];
    const ids = forms.map(form => this.encode(form));
    // of as many tokens those that were merged first
    const earlier = (a, b) => [a.length, ...a].find((id, i) => id !== [b.length, ...b][i]) <
      [b.length, ...b].find((id, i) => id !== [a.length, ...a][i]);
    return forms[range(4).reduce((best, i) => earlier(ids[i], ids[best]) ? i : best)];
  }

  /** Ids of one piece: the neighbours whose joined bytes have the lowest rank are joined first. */
  merge(piece) {
    let parts = this.table.has(piece) ? [piece] : [...piece];
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.table.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map(part => this.table.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  decode(ids) {
    const bytes = ids.filter(i => i < this.ranks.length).map(i => this.ranks[i]).join("");
    const utf8 = new TextDecoder("utf-8", {ignoreBOM: true});
    return utf8.decode(Uint8Array.from(bytes, byte => byte.charCodeAt(0)));
  }
}

// -- what torch brings along ----------------------------------------------------------------------

const range = (n, start = 0) => Array.from({length: n}, (_, i) => start + i);
const add = (a, b) => a.map((x, i) => x + b[i]);
const mean = rows => rows.reduce(add).map(x => x / rows.length);
const argmax = x => x.reduce((best, value, i) => value > x[best] ? i : best, 0);

/** a . b[at : at + a.length], in four sums that a processor works on at once. */
function dot(a, b, at = 0) {
  let s = 0, t = 0, u = 0, v = 0, i = 0;
  for (; i + 3 < a.length; i += 4) {
    s += a[i] * b[at + i];
    t += a[i + 1] * b[at + i + 1];
    u += a[i + 2] * b[at + i + 2];
    v += a[i + 3] * b[at + i + 3];
  }
  for (; i < a.length; i++) s += a[i] * b[at + i];
  return s + t + u + v;
}

/** nn.Linear: (T, in) -> (T, out). */
function linear(x, {data, shape: [n_out, n_in]}, bias) {
  return x.map(row => {
    const y = new Float32Array(n_out);
    for (let i = 0; i < n_out; i++) y[i] = dot(row, data, i * n_in) + (bias ? bias.data[i] : 0);
    return y;
  });
}

/** F.layer_norm: (T, C) -> (T, C). */
function layer_norm(x, gain, bias) {
  return x.map(row => {
    const mu = row.reduce((sum, value) => sum + value, 0) / row.length;
    const centred = row.map(value => value - mu);
    const scale = 1 / Math.sqrt(dot(centred, centred) / row.length + 1e-5);
    return centred.map((value, i) =>
      value * scale * (gain ? gain.data[i] : 1) + (bias ? bias.data[i] : 0));
  });
}

function softmax(x) {
  const top = Math.max(...x), e = x.map(value => Math.exp(value - top));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map(value => value / sum);
}

/** x * (1 + erf(x / sqrt 2)) / 2, with erf to seven digits (Abramowitz and Stegun 7.1.26). */
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741
    + t * (-1.453152027 + t * 1.061405429))));
  const erf = Math.sign(x) * (1 - p * Math.exp(-z * z));
  return x * (1 + erf) / 2;
}

function distance(a, b) {
  const gap = a.map((x, i) => x - b[i]);
  return Math.sqrt(dot(gap, gap));
}

// -- the transformer ------------------------------------------------------------------------------

/** Rotary positions: for each position the cosines and sines of dim/2 angles. */
function rotary(size, dim) {
  const frequency = range(dim / 2).map(i => 10000 ** (-2 * i / dim));
  return range(size).map(position => frequency.map(f => [Math.cos(position * f),
                                                         Math.sin(position * f)]));
}

/** Rotate each pair of dimensions of each head: x (T, C), rope (T, hs/2) -> (T, C). */
function rotate(x, rope) {
  return x.map((row, t) => {
    const y = new Float32Array(row.length);
    for (let i = 0; i < row.length; i += 2) {
      const [cos, sin] = rope[t][(i / 2) % rope[t].length];
      y[i] = row[i] * cos - row[i + 1] * sin;
      y[i + 1] = row[i] * sin + row[i + 1] * cos;
    }
    return y;
  });
}

/** Attention: q (Tq, C), k and v (Tk, C) -> {y (Tq, C), shares (Tq, Tk): mean over the heads}. */
function attend(q, k, v, n_head) {
  const hs = q[0].length / n_head, shares = [];
  const y = q.map(row => {
    const out = new Float32Array(row.length), share = new Float32Array(k.length);
    for (let head = 0; head < n_head; head++) {
      const begin = head * hs, query = row.subarray(begin, begin + hs);
      const p = softmax(k.map(key => dot(query, key, begin) / Math.sqrt(hs)));
      p.forEach((weight, j) => {
        share[j] += weight / n_head;
        for (let i = begin; i < begin + hs; i++) out[i] += weight * v[j][i];
      });
    }
    shares.push(share);
    return out;
  });
  return {y, shares};
}

/** Keys and values of the tokens read so far. */
class KVCache {
  keys = [];
  values = [];

  append(k, v) {
    this.keys.push(...k);
    this.values.push(...v);
    return [this.keys, this.values];
  }
}

class Attention {
  constructor(weights, name, n_head) {
    Object.assign(this, {qkv: weights[`${name}.qkv.weight`], proj: weights[`${name}.proj.weight`],
                         n_head});
  }

  /** x (T, C) -> (T, C), or (n_last, C): only the last n_last tokens attend. */
  forward(x, rope, {cache, n_last} = {}) {
    const C = x[0].length, qkv = linear(x, this.qkv);
    let [q, k, v] = range(3).map(i => qkv.map(row => row.subarray(i * C, (i + 1) * C)));
    [q, k] = [rotate(q, rope), rotate(k, rope)];
    if (cache) [k, v] = cache.append(k, v);
    if (n_last) q = q.slice(-n_last);
    const {y, shares} = attend(q, k, v, this.n_head);
    this.shares = shares;                       // kept to be drawn
    return linear(y, this.proj);
  }
}

class CrossAttention {
  constructor(weights, name, n_head) {
    Object.assign(this, {q: weights[`${name}.q.weight`], kv: weights[`${name}.kv.weight`],
                         proj: weights[`${name}.proj.weight`], n_head});
  }

  /** Slots (M, C) -> keys and values. */
  project(slots) {
    const kv = linear(slots, this.kv), C = slots[0].length;
    return {keys: kv.map(row => row.subarray(0, C)), values: kv.map(row => row.subarray(C))};
  }

  forward(x, memory) {
    const {y, shares} = attend(linear(x, this.q), memory.keys, memory.values, this.n_head);
    this.shares = shares;
    return linear(y, this.proj);
  }
}

/** Pre-norm block: self-attention, in the decoder cross-attention, and an MLP. */
class Block {
  constructor(weights, name, n_head) {
    const at = part => weights[`${name}.${part}.weight`];
    this.norm_attn = at("norm_attn");
    this.norm_cross = at("norm_cross");
    this.norm_mlp = at("norm_mlp");
    this.mlp = [at("mlp.0"), at("mlp.2")];
    this.attn = new Attention(weights, `${name}.attn`, n_head);
    this.cross = new CrossAttention(weights, `${name}.cross`, n_head);
  }

  forward(x, rope, {cache, memory, n_last} = {}) {
    const y = this.attn.forward(layer_norm(x, this.norm_attn), rope, {cache, n_last});
    x = x.slice(-y.length).map((row, t) => add(row, y[t]));
    if (memory) {
      const read = this.cross.forward(layer_norm(x, this.norm_cross), memory);
      x = x.map((row, t) => add(row, read[t]));
    }
    const hidden = linear(layer_norm(x, this.norm_mlp), this.mlp[0]).map(row => row.map(gelu));
    const out = linear(hidden, this.mlp[1]);
    return x.map((row, t) => add(row, out[t]));
  }
}

const blocks = (weights, name, n, n_head) =>
  range(n).map(i => new Block(weights, `${name}.blocks.${i}`, n_head));
const embed = ({data, shape: [, C]}, tokens) =>
  tokens.map(token => data.subarray(token * C, (token + 1) * C));

class Encoder {
  constructor(weights, name, cfg) {
    this.embed = weights[`${name}.embed.weight`];
    this.blocks = blocks(weights, name, cfg.n_layer, cfg.n_head);
    this.rope = rotary(cfg.block_size + 1, cfg.n_embd / cfg.n_head);
    this.embed_scale = cfg.embed_scale;
  }

  /** tokens at positions (T,) -> latents (T, C): the mean of the last top_k layers, each normed. */
  forward(tokens, positions, top_k = 1, n_last = tokens.length) {
    const rope = positions.map(position => this.rope[position]);
    let x = embed(this.embed, tokens).map(row => row.map(value => this.embed_scale * value));
    const layers = [x];
    this.blocks.forEach((block, i) => {
      x = block.forward(x, rope, i === this.blocks.length - 1 ? {n_last} : {});
      layers.push(x);
    });
    const last = layers.slice(-top_k).map(layer => layer_norm(layer.slice(-n_last)));
    return range(n_last).map(t => mean(last.map(layer => layer[t])));
  }
}

// -- predictor and decoder ------------------------------------------------------------------------

class Predictor {
  constructor(weights, cfg) {
    const at = (part, kind = "weight") => weights[`predictor.${part}.${kind}`];
    this.context_proj = at("context_proj");
    this.mask_token = weights["predictor.mask_token"].data;
    this.blocks = blocks(weights, "predictor", cfg.pred_layer, cfg.n_head);
    this.norm = [at("norm"), at("norm", "bias")];
    this.proj = [at("latent_proj"), at("latent_proj", "bias")];
    this.rope = rotary(cfg.block_size + 1, cfg.pred_embd / cfg.n_head);
  }

  /** Context latents (N, C), positions of these and of K queries (N+K,) -> states (K, P). */
  forward(context, positions) {
    const n_last = positions.length - context.length;
    const rope = positions.map(position => this.rope[position]);
    let x = [...linear(context, this.context_proj), ...Array(n_last).fill(this.mask_token)];
    this.blocks.forEach((block, i) => {
      x = block.forward(x, rope, i === this.blocks.length - 1 ? {n_last} : {});
    });
    return layer_norm(x, ...this.norm);
  }

  latent_proj(states) {
    return linear(states, ...this.proj);
  }
}

class Decoder {
  constructor(weights, cfg) {
    const {"decoder.slots.weight": w, "decoder.slots.bias": b} = weights;
    this.slots = w && (x => linear(x, w, b));   // none where the decoder reads the question
    this.cfg = cfg;
    this.embed = weights["decoder.embed.weight"];
    this.blocks = blocks(weights, "decoder", cfg.dec_layer, cfg.n_head);
    this.norm = weights["decoder.norm.weight"];
    this.rope = rotary(cfg.answer_size, cfg.n_embd / cfg.n_head);
  }

  /** A thought {latent, context} -> slots (M, C). */
  memory_slots(thought) {
    if (!this.slots) return thought.context;
    const [row] = this.slots(layer_norm([thought.latent])), C = this.cfg.n_embd;
    return range(this.cfg.n_slots).map(i => row.subarray(i * C, (i + 1) * C));
  }

  /** Slots -> what the cross-attention of each block reads. */
  read(slots) {
    return this.blocks.map(block => block.cross.project(slots));
  }

  /** The newest token -> its state (C,). */
  forward(token, memories, caches) {
    const rope = [this.rope[caches[0].keys.length]];
    let x = embed(this.embed, [token]);
    this.blocks.forEach((block, i) => {
      x = block.forward(x, rope, {cache: caches[i], memory: memories[i]});
    });
    return layer_norm(x, this.norm)[0];
  }

  token_head(state) {
    return linear([state], this.embed)[0];
  }
}

// -- the model ------------------------------------------------------------------------------------

class TJEPA {
  constructor(cfg, weights) {
    this.cfg = cfg;
    [this.bos, this.eos] = [cfg.vocab_size - 3, cfg.vocab_size - 2];
    this.context_encoder = new Encoder(weights, "context_encoder", cfg);
    this.target_encoder = new Encoder(weights, "target_encoder", cfg);
    this.predictor = new Predictor(weights, cfg);
    this.decoder = new Decoder(weights, cfg);
    const {"W.weight": w, "W.bias": b} = weights;
    this.W = x => w ? linear(x, w, b) : x;      // the identity where the run is its own teacher
  }

  /** Target latents of the last n_removed of tokens at positions (T,): one mean, or one each. */
  target_latents(tokens, positions, n_removed) {
    const {cfg} = this, encoder = cfg.stop_gradient ? this.target_encoder : this.context_encoder;
    const removed = encoder.forward(tokens, positions, cfg.top_k, n_removed);
    const target = cfg.target === "token" ? removed : [mean(removed)];
    return cfg.target_norm ? layer_norm(target) : target;
  }

  /** Latent prediction error of the tokens `middle` between left and right: low if they fit. */
  energy(left, middle, right) {
    const {cfg} = this, n = middle.length, begin = left.length;
    const kept = [...range(begin), ...range(right.length, begin + n)], gap = range(n, begin);
    const target = this.target_latents([...left, ...right, ...middle], [...kept, ...gap], n);
    const context = this.context_encoder.forward([...left, ...right], kept);
    const latents = this.predictor.latent_proj(this.predictor.forward(context, [...kept, ...gap]));
    const predicted = cfg.target === "token" ? latents : [mean(latents)];
    const error = (p, t) => cfg.loss === "mse" ? distance(p, t) ** 2 / p.length
      : 1 - dot(p, t) / Math.sqrt(dot(p, p) * dot(t, t));
    return predicted.reduce((sum, p, i) => sum + error(p, target[i]), 0) / predicted.length;
  }

  /** Predict the latent of the answer: question tokens (T,) -> the thought {latent, context}. */
  think(question) {
    const positions = range(question.length);
    const context = this.context_encoder.forward(question, positions);
    const state = this.predictor.forward(context, [...positions, question.length]);
    const [latent] = this.W(this.predictor.latent_proj(state));
    return {latent, context};
  }

  /** Say what is in the slots (M, C), greedily: yields token ids until EOS. */
  *speak(slots) {
    const memories = this.decoder.read(slots);
    const caches = this.decoder.blocks.map(() => new KVCache());
    for (let token = this.bos, n = 0; n < this.cfg.answer_size; n++) {
      token = argmax(this.decoder.token_head(this.decoder.forward(token, memories, caches)));
      if (token >= this.bos - 1) return;        // the special tokens come last
      yield token;
    }
  }
}
