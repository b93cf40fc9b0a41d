/*
 * The page: what is typed, dragged or switched is computed by tjepa.js and drawn here. All that
 * can be known beforehand (curves, colours, code) was drawn by labs/page.py.
 */
const $ = id => document.getElementById(id);
const page = JSON.parse($("data").textContent);
const paint = () => new Promise(requestAnimationFrame);
const quiet = matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A new element inside `parent`; attribute `text` is its text. */
function make(parent, kind, {text = "", ...attributes} = {}) {
  const node = document.createElementNS(parent.namespaceURI, kind);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  if (text) node.textContent = text;
  return parent.appendChild(node);
}

/** Rows of name, bar and number, those that fit best first; the line marks the threshold. */
function draw_bars(box, rows, digits, threshold) {
  const most = 1.05 * Math.max(threshold ?? 0, ...rows.map(row => row.value));
  box.replaceChildren();
  rows.forEach(({name, value, mark = ""}) => {
    const row = make(box, "li", {class: value > (threshold ?? Infinity) ? "far" : mark});
    make(row, "span", {text: name});
    make(make(row, "div"), "i", {style: `width:${100 * value / most}%`});
    make(row, "b", {text: value.toFixed(digits)});
  });
  box.classList.toggle("limit", threshold !== undefined);
  box.style.setProperty("--at", `${100 * threshold / most}%`);
}

/** A map: dots for concepts, rings for thoughts, a line from each thought to its answer. */
class Picture {
  constructor(svg, answers, n_thoughts) {
    this.lines = range(n_thoughts).map(() => make(svg, "line"));
    this.dots = answers.map(i => {
      const dot = make(svg, "circle", {r: 0.017, class: `dot kind${page.kinds[i]}`});
      make(dot, "title", {text: page.answers[i]});
      return dot;
    });
    this.rings = range(n_thoughts).map(() => make(svg, "circle", {r: 0.02, class: "ring"}));
  }

  /** Put concepts and thoughts at points (n, 2); right: the concept that each thought should be. */
  place(concepts, thoughts, right) {
    const at = (node, [x, y]) => { node.setAttribute("cx", x); node.setAttribute("cy", y); };
    this.dots.forEach((dot, i) => at(dot, concepts[i]));
    this.rings.forEach((ring, i) => at(ring, thoughts[i]));
    this.lines.forEach((line, i) => {
      const [a, b] = [thoughts[i], concepts[right[i]] ?? thoughts[i]];
      [a[0], a[1], b[0], b[1]].forEach((value, k) =>
        line.setAttribute(["x1", "y1", "x2", "y2"][k], value));
    });
  }
}

// -- ask ------------------------------------------------------------------------------------------

let model, tokenizer, concepts, where;          // where: the concepts on the map, (A, 2)
let asked = null, turn = 0;                     // asked: {ids, thought, latent (may be moved)}

/** The weights: integers of 16 bits, all upper bytes before all lower ones; a scale for each. */
async function load() {
  const packed = Uint8Array.from(atob($("weights").textContent.trim()), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer()), n = bytes.length / 2;
  const weights = {};
  let begin = 0;
  for (const [name, [scale, shape]] of Object.entries(page.sizes)) {
    const data = new Float32Array(shape.reduce((a, b) => a * b));
    for (let i = 0; i < data.length; i++, begin++) {
      data[i] = scale * (bytes[begin] << 24 >> 16 | bytes[n + begin]);
    }
    weights[name] = {data, shape};
  }
  concepts = embed(weights.concepts, range(page.answers.length));
  where = linear(concepts, page.map.weight, page.map.bias);
  model = new TJEPA(page.cfg, weights);
  tokenizer = new Tokenizer(page.tokenizer);
}

/** Question -> tokens -> thought -> words. */
async function ask(question) {
  const ids = tokenizer.encode_question(question);
  if (ids.length > page.cfg.block_size || !plain(question)) {
    $("verdict").textContent = `Please ask with 1 to ${page.cfg.block_size} tokens.`;
    return;
  }
  const thought = model.think(ids);
  // what the mask token, which stands behind the question, attends to
  const [shares] = model.predictor.blocks.at(-1).attn.shares;
  $("tokens").replaceChildren();
  ids.forEach((id, i) => make($("tokens"), "span",
    {text: tokenizer.decode([id]), style: `--share:${Math.min(1, 2.5 * shares[i])}`}));
  make($("tokens"), "span", {text: "?", class: "mask", title: "mask token: what would follow?"});
  asked = {ids, thought, latent: thought.latent};
  await answer();
}

/** Show where the thought lies and say it, as the switches want it. */
async function answer() {
  const mine = ++turn, {latent, thought} = asked, moved = latent !== thought.latent;
  const far = concepts.map(concept => distance(concept, latent));
  const order = range(far.length).sort((a, b) => far[a] - far[b]).slice(0, 5);
  const known = far[order[0]] <= page.threshold, name = page.answers[order[0]];
  draw_bars($("nearest"), order.map(i => ({name: page.answers[i], value: far[i]})), 2,
            page.threshold);
  draw_thought(linear([latent], page.map.weight, page.map.bias)[0], order, known);
  const [near, limit] = [far[order[0]].toFixed(1), page.threshold.toFixed(1)];
  $("verdict").textContent = (moved ? "Moved by you. " : "") + (known
    ? `Known: ${name} is ${near} away, within the threshold of ${limit}.`
    : `Unknown: even the nearest concept, ${name}, is ${near} away, beyond the threshold of `
      + `${limit}.`);

  $("words").replaceChildren();
  $("note").textContent = $("said").textContent = "";
  if ($("off").checked) {
    $("note").textContent = "Decoder off: no words, and yet the thought is there, "
      + (known ? `near ${name}.` : "far from all that is known.");
  } else if (!known && !$("anyway").checked) {
    make($("words"), "output", {text: "I don't know", class: "refused"});
    $("said").textContent = "I don't know";
    $("note").textContent = "It could only guess. To hear the guess: answer even if unknown.";
  } else {
    let read = {...thought, latent};
    if (!known) $("note").textContent = "A guess: the thought is far from all that is known.";
    if ($("shuffled").checked) {
      const other = page.others[(asked.ids.length + order[0]) % page.others.length];
      read = model.think(tokenizer.encode_question(other));
      $("note").textContent = `The decoder reads the thought of another question: ${other}`;
    }
    const slots = model.decoder.memory_slots(read).slice(0, $("single").checked ? 1 : undefined);
    if ($("single").checked) {
      $("note").textContent += " One slot: each word attends to it by 1, whatever it asks for.";
    }
    await say(slots, mine);
  }
  document.body.dataset.said = mine;
}

/** Words, one after the other; under each, what it attends to: a cell for each slot. */
async function say(slots, mine) {
  const said = [], output = make($("words"), "output"), grid = make($("words"), "div");
  for (const token of model.speak(slots)) {
    said.push(token);
    output.textContent = tokenizer.decode(said).trim();
    $("said").textContent = `\u201c${output.textContent}\u201d`;
    const column = make(grid, "span", {class: "column"});
    make(column, "b", {text: tokenizer.decode([token])});
    const shares = mean(model.decoder.blocks.map(block => block.cross.shares[0]));
    shares.forEach((share, i) => make(column, "i",
      {style: `--share:${share}`, title: `slot ${i + 1}: ${share.toFixed(2)}`}));
    await paint();
    if (mine !== turn) return;                  // something else was asked meanwhile
  }
}

function draw_thought([x, y], order, known) {
  $("thought").setAttribute("transform", `translate(${x} ${y})`);
  $("thought").classList.toggle("far", !known);
  $("near").replaceChildren();
  order.slice(0, known ? 1 : 3).reverse().forEach(i => {
    const [cx, cy] = where[i], nearest = i === order[0];
    const kind = {class: nearest && known ? "" : "weak"};
    make($("near"), "line", {x1: x, y1: y, x2: cx, y2: cy, ...kind});
    make($("near"), "circle", {cx, cy, r: 0.022});
    if (!nearest && distance([cx, cy], where[order[0]]) < 0.15) return;     // no room for its name
    const text = {x: cx + 0.04, y: cy - 0.02, text: page.answers[i], ...kind};
    if (cx > 0.4) Object.assign(text, {x: cx - 0.04, "text-anchor": "end"});
    make($("near"), "text", text);
  });
}

/** Move the thought to a point of the map: there it is the mean of the concepts around it. */
function move_to(point) {
  const places = [...where, linear([asked.thought.latent], page.map.weight, page.map.bias)[0]];
  const closeness = places.map(place => (distance(place, point) + 1e-4) ** -6);
  const sum = closeness.reduce((a, b) => a + b), latent = new Float32Array(concepts[0].length);
  [...concepts, asked.thought.latent].forEach((concept, i) =>
    concept.forEach((value, k) => { latent[k] += value * closeness[i] / sum; }));
  asked.latent = latent;
  asked.point = point;
  answer();
}

function listen_to_map() {
  const follow = event => {
    const matrix = $("map").getScreenCTM().inverse();
    const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
    move_to([x, y]);
  };
  const grip = $("thought");
  grip.addEventListener("pointerdown", event => grip.setPointerCapture(event.pointerId));
  grip.addEventListener("pointermove", event => {
    if (grip.hasPointerCapture(event.pointerId)) follow(event);
  });
  $("map").addEventListener("click", event => { if (!grip.contains(event.target)) follow(event); });
  $("map").addEventListener("keydown", event => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const home = linear([asked.thought.latent], page.map.weight, page.map.bias)[0];
    const by = step[event.key], [x, y] = asked.latent === asked.thought.latent ? home : asked.point;
    if (by) move_to([x + 0.04 * by[0], y + 0.04 * by[1]]);
    if (event.key === "Escape") answer(asked.latent = asked.thought.latent);
    if (by) event.preventDefault();
  });
}

// -- a gap in brackets ----------------------------------------------------------------------------

let filling = 0;

/** Energy of each answer in the gap; the list is drawn while they are computed. */
async function fill(text) {
  const mine = ++filling;                       // ends a list that is still growing
  const found = text.match(/^([^\][]*)\[([^\][]*)\]([^\][]*)$/);
  if (!found || !found[2].trim() || !(found[1] + found[3]).trim()) {
    $("rank").textContent = "Put one part of the text in brackets, as in [Paris].";
    return;
  }
  const [before, truth, after] = [found[1].trimStart(), found[2].trim(), found[3].trimEnd()];
  const left = before ? tokenizer.encode(" " + before.trimEnd()) : [];
  const right = after ? tokenizer.encode(after) : [];
  const encode = name => tokenizer.encode((/\S$/.test(before) ? "" : " ") + name);
  const room = page.cfg.block_size - left.length - right.length;
  const values = [...new Set([truth, ...page.answers])].filter(v => encode(v).length <= room);
  if (values[0] !== truth) {
    $("rank").textContent = `Please write at most ${page.cfg.block_size} tokens.`;
    return;
  }
  const rows = [];
  let painted = performance.now();
  for (const name of values) {
    const value = model.energy(left, encode(name), right);
    rows.push({name, value, mark: name === truth ? "own" : ""});
    if (performance.now() - painted < 60 && rows.length < values.length) continue;
    rows.sort((a, b) => a.value - b.value);
    draw_bars($("energies"), rows.slice(0, 6), 3);
    const rank = 1 + rows.findIndex(row => row.mark);
    const so_far = rows.length < values.length ? " compared so far" : "";
    $("rank").textContent = `${truth}: rank ${rank} of ${rows.length}${so_far}, energy `
      + rows[rank - 1].value.toFixed(3);
    await paint();
    if (mine !== filling) return;               // another text was given meanwhile
    painted = performance.now();
  }
  document.body.dataset.filled = mine;
}

// -- time -----------------------------------------------------------------------------------------

/** Show an evaluation of the training in all maps, curves and figures. */
function show_frame(number) {
  const {x, label} = page.frames[number];
  $("moment").textContent = label;
  document.querySelectorAll(".cursor").forEach(line =>
    line.setAttribute("transform", `translate(${x} 0)`));
  page.runs.forEach((run, i) => {
    const figures = $("figures" + i), frame = run.frames[number];
    figures.querySelectorAll("b").forEach((cell, k) => { cell.textContent = frame.figures[k]; });
    figures.dataset.health = frame.health;
    if (frame.concepts) glide(run, frame);
  });
}

/** Move the points of a run from where they are to a frame, in a third of a second. */
async function glide(run, frame) {
  const from = quiet || !run.at ? frame : run.at, begin = performance.now(), mine = {};
  run.gliding = mine;
  for (let t = 0; t < 1 && run.gliding === mine; await paint()) {
    t = from === frame ? 1 : Math.min(1, (performance.now() - begin) / 350);
    const mix = name => frame[name].map(([x, y], i) =>
      [from[name][i][0] * (1 - t) + x * t, from[name][i][1] * (1 - t) + y * t]);
    run.at = {concepts: mix("concepts"), thoughts: mix("thoughts")};
    run.picture.place(run.at.concepts, run.at.thoughts, run.right);
  }
}

let playing = false;

/** Show one evaluation after the other, until the button is pressed again. */
async function play() {
  playing = !playing;
  if (!playing) return;
  const slider = $("time"), from = +slider.value === +slider.max ? 0 : +slider.value;
  $("play").textContent = "Pause";
  for (let k = from; playing && k < page.frames.length; k++) {
    slider.value = k;
    show_frame(k);
    await new Promise(done => setTimeout(done, 600));
    if (+slider.value !== k) break;             // moved by hand
  }
  playing = false;
  $("play").textContent = "Play";
}

// -- begin ----------------------------------------------------------------------------------------

async function main() {
  await load();
  new Picture($("dots"), range(page.answers.length), 0).place(where);
  const on = (id, event, act) => $(id).addEventListener(event, act);
  const form = (id, act) => on(id, "submit", event => {
    event.preventDefault();
    act(new FormData(event.target).get("text"));
  });
  form("ask", ask);
  form("gap", fill);
  on("examples", "click", event => {
    if (event.target.matches("button")) ask($("question").value = event.target.textContent);
  });
  on("switches", "change", answer);
  listen_to_map();
  page.runs.forEach((run, i) => {
    if (run.answers) run.picture = new Picture($("run" + i), run.answers, run.right.length);
  });
  on("time", "input", () => show_frame(+$("time").value));
  on("play", "click", play);
  show_frame(+$("time").value);
  await ask($("question").value);
  new IntersectionObserver(([seen], observer) => {
    if (!seen.isIntersecting || !$("gap").elements.text.value) return;
    observer.disconnect();
    $("gap").requestSubmit();
  }).observe($("gap"));
}
main();
