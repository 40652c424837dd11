// The explorer of a run, in two homes: a Jupyter widget (anywidget calls `render`), and a page that carries its own data
// (`openPage`). Both call `mount`. Letters: N images, n of them drawn, E epochs. `rows` are rows of the table of images.

const LISTS = {
  mixed: ["Mixed clusters", ["cluster", "images", "persons", "wrong pairs"]],
  split: ["Split identities", ["person", "images", "clusters", "outliers", "missed pairs"]],
  changed: ["Changed clusters", ["cluster", "images", "joined", "left"]],
  outliers: ["Outliers", ["outliers", "images"]],
};
const COLOURS = { cluster: "pseudo label", identity: "true id", camera: "camera" };
const GLIDE = 450, PAUSE = 500; // milliseconds: between two epochs, and at rest on each when it plays
const PAGE = 120; // images shown at once

function element(tag, name, parent, text) {
  const el = document.createElement(tag);
  if (name) el.className = "pclx-" + name;
  if (text !== undefined) el.textContent = text;
  if (parent) parent.append(el);
  return el;
}

const plural = (k, one, many = one + "s") => `${k.toLocaleString("en")} ${k === 1 ? one : many}`;
const parseRgb = (css) => (css.match(/[\d.]+/g) || [255, 255, 255]).slice(0, 3).map(Number);
const toCss = ([r, g, b]) => `rgb(${r},${g},${b})`;

// ---------------------------------------------------------------- data

// What the lists, the legend and the picture ask of the arrays
function model(data) {
  const { N, n, E } = data, { rows, xy, labels, pids, camids } = data.arrays, palette = data.palettes;
  const place = new Int32Array(N).fill(-1); // of a row among the drawn
  rows.forEach((row, j) => (place[row] = j));
  const dense = new Map(data.persons.map((p, i) => [p, i])), camera = new Map(data.cameras.map((c, i) => [c, i]));
  const label = (e, row) => labels[e * N + row];
  const number = { // what colours a row: an index into the palette, -1 = grey
    cluster: label,
    identity: (e, row) => (pids[row] < 0 ? -1 : dense.get(pids[row])),
    camera: (e, row) => (camids[row] < 0 ? -1 : camera.get(camids[row])),
  };
  const all = Array.from({ length: N }, (_, i) => i);
  const since = (e, row) => { // epochs in a row as an outlier, this one included
    let k = 0;
    while (k <= e && label(e - k, row) < 0) k++;
    return k;
  };
  return {
    N, n, E, rows, xy, place, label, all, since, pid: (row) => pids[row], camid: (row) => camids[row],
    number: (how, e, row) => number[how](e, row),
    rgb: (how, k) => palette[how].slice(3 * k, 3 * k + 3),
    cluster: (e, c) => all.filter((row) => label(e, row) === c),
    person: (p) => all.filter((row) => pids[row] === p),
    camera: (c) => all.filter((row) => camids[row] === c),
    outliers: (e, k = 0) => {
      const out = all.filter((row) => label(e, row) < 0), age = new Map(out.map((row) => [row, since(e, row)]));
      return out.filter((row) => !k || age.get(row) === k).sort((a, b) => age.get(b) - age.get(a) || a - b);
    },
  };
}

// ---------------------------------------------------------------- the picture

// Dots are blended into an image by hand: 13,000 of them take a few milliseconds, with or without a graphics card
class Picture {
  constructor(canvas, run) {
    Object.assign(this, { canvas, run, zoom: 1, dx: 0, dy: 0, hover: -1, lasso: null, stamps: new Map() });
    this.ctx = canvas.getContext("2d");
    this.x = new Float32Array(run.n);
    this.y = new Float32Array(run.n);
  }

  resize() {
    const box = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    const W = Math.max(1, Math.round(box.width * ratio)), H = Math.max(1, Math.round(box.height * ratio));
    if (this.image && W === this.canvas.width && H === this.canvas.height && ratio === this.ratio) return;
    Object.assign(this.canvas, { width: W, height: H });
    Object.assign(this, { ratio, image: this.ctx.createImageData(W, H), stamps: new Map() });
    this.pixels = new Uint32Array(this.image.data.buffer);
  }

  // Opacity of a disc of this radius, on a grid of pixels, for 4 x 4 places of its centre within a pixel
  stamp(radius) {
    if (this.stamps.has(radius)) return this.stamps.get(radius);
    const half = Math.ceil(radius) + 1, size = 2 * half + 1, out = [];
    for (let s = 0; s < 16; s++) {
      const cx = half + (s & 3) / 4, cy = half + (s >> 2) / 4, alpha = new Uint8Array(size * size);
      for (let i = 0; i < alpha.length; i++) {
        const gap = radius + 0.5 - Math.hypot((i % size) - cx, Math.floor(i / size) - cy);
        alpha[i] = Math.round(255 * Math.min(1, Math.max(0, gap)));
      }
      out.push(alpha);
    }
    this.stamps.set(radius, { half, size, out });
    return this.stamps.get(radius);
  }

  // Screen places of all drawn rows at time t, a number between 0 and E - 1
  locate(t) {
    const { n, E, xy } = this.run, a = Math.min(E - 1, Math.floor(t)), b = Math.min(E - 1, a + 1), f = t - a;
    const W = this.canvas.width, H = this.canvas.height, side = 0.94 * Math.min(W, H) * this.zoom, unit = side / 65535;
    const ox = W / 2 - side / 2 + this.dx * this.ratio, oy = H / 2 - side / 2 + this.dy * this.ratio;
    for (let j = 0, p = 2 * a * n, q = 2 * b * n; j < n; j++, p += 2, q += 2) {
      this.x[j] = ox + unit * (xy[p] + f * (xy[q] - xy[p]));
      this.y[j] = oy + unit * (xy[p + 1] + f * (xy[q + 1] - xy[p + 1]));
    }
  }

  dot(j, radius, rgb, strength) {
    const { half, size, out } = this.stamp(radius), W = this.canvas.width, H = this.canvas.height, px = this.image.data;
    const ix = Math.floor(this.x[j]), iy = Math.floor(this.y[j]);
    if (ix < -half || iy < -half || ix >= W + half || iy >= H + half) return;
    const alpha = out[((this.x[j] - ix) * 4) | (((this.y[j] - iy) * 4) << 2)];
    const r = rgb[0], g = rgb[1], b = rgb[2];
    const x0 = Math.max(0, half - ix), x1 = Math.min(size, W - ix + half), y1 = Math.min(size, H - iy + half);
    for (let v = Math.max(0, half - iy); v < y1; v++) {
      for (let u = x0, k = v * size + x0, o = 4 * ((iy - half + v) * W + ix - half + x0); u < x1; u++, k++, o += 4) {
        const w = alpha[k] * strength;
        if (w === 0) continue;
        px[o] += ((r - px[o]) * w) / 255;
        px[o + 1] += ((g - px[o + 1]) * w) / 255;
        px[o + 2] += ((b - px[o + 2]) * w) / 255;
      }
    }
  }

  // groups: lists of drawn places, painted one after the other: {at, radius, strength, rgb(j)}
  draw(t, groups, theme) {
    this.resize();
    this.locate(t);
    const [r, g, b] = theme.paper;
    this.pixels.fill(((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
    for (const { at, radius, strength, rgb } of groups) for (const j of at) this.dot(j, radius, rgb(j), strength);
    this.ctx.putImageData(this.image, 0, 0);
    this.ctx.strokeStyle = toCss(theme.ink);
    this.ctx.lineWidth = 1.5 * this.ratio;
    if (this.hover >= 0) {
      this.ctx.beginPath();
      this.ctx.arc(this.x[this.hover], this.y[this.hover], 7 * this.ratio, 0, 2 * Math.PI);
      this.ctx.stroke();
    }
    if (this.lasso) {
      this.ctx.beginPath();
      this.lasso.forEach(([x, y]) => this.ctx.lineTo(x * this.ratio, y * this.ratio));
      this.ctx.closePath();
      this.ctx.setLineDash([4 * this.ratio, 3 * this.ratio]);
      this.ctx.stroke();
      this.ctx.setLineDash([]);
    }
  }

  // The drawn place nearest to a point of the canvas, -1 if none is within 10 pixels
  nearest(px, py) {
    let best = (10 * this.ratio) ** 2, found = -1;
    for (let j = 0; j < this.run.n; j++) {
      const d = (this.x[j] - px * this.ratio) ** 2 + (this.y[j] - py * this.ratio) ** 2;
      if (d <= best) [best, found] = [d, j];
    }
    return found;
  }

  inside(polygon) { // even-odd rule
    const p = polygon.map(([x, y]) => [x * this.ratio, y * this.ratio]), found = [];
    for (let j = 0; j < this.run.n; j++) {
      let odd = false;
      for (let i = 0, k = p.length - 1; i < p.length; k = i++) {
        const [xi, yi] = p[i], [xk, yk] = p[k], y = this.y[j];
        if (yi > y !== yk > y && this.x[j] < ((xk - xi) * (y - yi)) / (yk - yi) + xi) odd = !odd;
      }
      if (odd) found.push(j);
    }
    return found;
  }

  zoomAt(factor, px, py) {
    const box = this.canvas.getBoundingClientRect(), zoom = Math.min(60, Math.max(1, this.zoom * factor)), f = zoom / this.zoom;
    const cx = px - box.width / 2, cy = py - box.height / 2;
    this.dx = zoom === 1 ? 0 : cx - f * (cx - this.dx);
    this.dy = zoom === 1 ? 0 : cy - f * (cy - this.dy);
    this.zoom = zoom;
  }
}

// ---------------------------------------------------------------- the whole

// host: {state: {epoch (a place among the epochs), colour, selected}, changed(state), thumb(row, el)}; returns {set, destroy}
function mount(root, data, host) {
  const run = model(data), state = { epoch: 0, colour: "cluster", selected: [], ...host.state };
  const stop = new AbortController(), on = (el, type, f, more) => el.addEventListener(type, f, { signal: stop.signal, ...more });
  let t = state.epoch, from = t, began = 0, playing = 0, frame = 0, tab = data.lists[0], limit = PAGE, mark = new Uint8Array(run.N);
  root.replaceChildren();
  root.classList.add("pclx");
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true"; // arrow keys are ours, not JupyterLab's
  data.tile.forEach((v, i) => root.style.setProperty(["--pclx-width", "--pclx-height"][i], v + "px"));

  const bar = element("div", "bar", root);
  element("span", "title", bar, data.title);
  element("span", "caption", bar);
  const pick = element("label", "pick", bar, "colour ");
  const colour = element("select", "colour", pick);
  for (const how of data.colours) colour.append(new Option(COLOURS[how], how));
  const plot = element("div", "plot", root), canvas = element("canvas", "canvas", plot), tip = element("div", "tip", plot);
  const zoomers = element("div", "zoom", plot);
  for (const [text, name, factor] of [["+", "closer", 1.5], ["−", "farther", 1 / 1.5], ["⤢", "whole", 0]]) {
    const b = element("button", "zoom-" + name, zoomers, text);
    b.title = name;
    on(b, "click", () => { const box = canvas.getBoundingClientRect(); picture.zoomAt(factor, box.width / 2, box.height / 2); paint(); });
  }
  const legend = element("div", "legend", plot);
  const time = element("div", "time", root), play = element("button", "play", time, "▶"), slider = element("input", "epoch", time);
  Object.assign(slider, { type: "range", min: 0, max: run.E - 1, step: 1, value: state.epoch, disabled: run.E < 2 });
  slider.setAttribute("aria-label", "epoch");
  play.title = "play the epochs (space)";
  const name = element("output", "epoch-name", time);
  const side = element("div", "side", root), tabs = element("div", "tabs", side), list = element("div", "list", side);
  const head = element("div", "selection", side), images = element("div", "images", side);
  element("div", "note", root, data.note);
  element("div", "help", root, "click: a cluster · drag: lasso · shift-drag: move · wheel: zoom · ← →: epochs · space: play · esc: select nothing");
  for (const which of data.lists) {
    const b = element("button", "tab", tabs, LISTS[which][0]);
    b.dataset.tab = which;
    on(b, "click", () => { tab = which; showList(); });
  }
  const picture = new Picture(canvas, run);

  // ---- colours
  let theme;
  const readTheme = () => {
    const style = getComputedStyle(root), paper = parseRgb(style.backgroundColor), ink = parseRgb(style.color);
    theme = { paper, ink, dark: paper[0] + paper[1] + paper[2] < 384 };
    theme.grey = paper.map((v, i) => Math.round(0.68 * v + 0.32 * ink[i]));
    const lighten = (v) => (theme.dark ? v + 0.3 * (255 - v) : v);
    theme.of = (how, k) => (k < 0 ? theme.grey : run.rgb(how, k).map((v) => Math.round(lighten(v))));
  };
  const rgbOf = (row, how = state.colour, e = state.epoch) => theme.of(how, run.number(how, e, row));

  // ---- the picture
  const groups = () => {
    const { rows, n } = run, some = state.selected.length > 0, base = Math.min(5, Math.max(2, 160 / Math.sqrt(n))) * picture.ratio;
    const cache = new Map(), rgb = (j) => {
      const k = run.number(state.colour, state.epoch, rows[j]);
      if (!cache.has(k)) cache.set(k, theme.of(state.colour, k));
      return cache.get(k);
    };
    const lone = [], rest = [], chosen = [];
    for (let j = 0; j < n; j++) (mark[rows[j]] ? chosen : run.label(state.epoch, rows[j]) < 0 ? lone : rest).push(j);
    const pale = some ? 0.22 : 1;
    return [
      { at: lone, radius: 0.6 * base, strength: pale, rgb },
      { at: rest, radius: base, strength: 0.85 * pale, rgb },
      { at: chosen, radius: base + 2 * picture.ratio, strength: 1, rgb: () => theme.ink },
      { at: chosen, radius: base + 0.8 * picture.ratio, strength: 1, rgb },
    ];
  };
  const paint = () => {
    if (frame) return;
    frame = requestAnimationFrame((now) => {
      frame = 0;
      const f = Math.min(1, (now - began) / GLIDE);
      t = from + (state.epoch - from) * (f * f * (3 - 2 * f));
      if (!canvas.isConnected) return;
      picture.resize();
      picture.draw(t, groups(), theme);
      root.dataset.time = t.toFixed(2);
      if (f < 1) paint();
      else if (playing && now > began + GLIDE + PAUSE) advance();
      else if (playing) paint();
    });
  };

  // ---- epochs
  const goTo = (e, tell = true) => {
    e = Math.min(run.E - 1, Math.max(0, e));
    if (e === state.epoch) return;
    [from, began] = [Math.abs(t - e) > 4 ? e + 4 * Math.sign(t - e) : t, performance.now()];
    state.epoch = e;
    if (tell) host.changed(state);
    showAll();
  };
  const setPlaying = (yes) => {
    if (yes && state.epoch === run.E - 1) goTo(0);
    playing = yes;
    play.textContent = yes ? "❚❚" : "▶";
    paint();
  };
  const advance = () => (state.epoch < run.E - 1 ? goTo(state.epoch + 1) : setPlaying(false));

  // ---- selection
  const select = (rows, tell = true) => {
    state.selected = Array.from(rows);
    mark = new Uint8Array(run.N);
    for (const row of state.selected) mark[row] = 1;
    limit = PAGE;
    if (tell) host.changed(state);
    showSelection();
    markList();
    paint();
  };
  const clusterOf = (row) => { const c = run.label(state.epoch, row); return c < 0 ? [row] : run.cluster(state.epoch, c); };
  const nameOf = (rows) => {
    const e = state.epoch, clusters = new Set(rows.map((r) => run.label(e, r))), persons = new Set(rows.map(run.pid));
    const [c] = clusters, [p] = persons;
    if (clusters.size === 1 && c >= 0 && run.cluster(e, c).length === rows.length) return `cluster ${c}`;
    if (persons.size === 1 && p >= 0 && run.person(p).length === rows.length) return `person ${p}`;
    return "selection";
  };
  const describe = (rows) => {
    const e = state.epoch, count = (f) => new Set(rows.map(f).filter((v) => v >= 0)).size, parts = [plural(rows.length, "image")];
    if (data.persons.length) parts.push(plural(count(run.pid), "person"));
    if (data.cameras.length) parts.push(plural(count(run.camid), "camera"));
    const out = rows.filter((r) => run.label(e, r) < 0).length;
    parts.push(plural(count((r) => run.label(e, r)), "cluster") + (out ? ` and ${plural(out, "outlier")}` : ""));
    const hidden = rows.filter((r) => run.place[r] < 0).length;
    return parts.join(", ") + (hidden ? `; ${hidden} not drawn` : "");
  };
  const tile = (row, parent) => {
    const el = element("button", "thumb", parent), picture_ = element("span", "photo", el);
    el.dataset.row = row;
    el.style.borderColor = toCss(rgbOf(row));
    const c = run.label(state.epoch, row), camera = run.camid(row) < 0 ? "" : ` · cam ${run.camid(row)}`;
    const person = run.pid(row) < 0 ? "" : `person ${run.pid(row)}`;
    el.title = `${data.names[row]}\n${person}${camera}\n${c < 0 ? "outlier" : `cluster ${c}`}`;
    host.thumb(row, picture_, data.names[row]);
    on(el, "click", () => select(clusterOf(row)));
    on(el, "pointerenter", () => { picture.hover = run.place[row]; paint(); });
    on(el, "pointerleave", () => { picture.hover = -1; paint(); });
  };
  const showSelection = () => {
    const rows = state.selected, e = state.epoch;
    head.replaceChildren();
    images.replaceChildren();
    if (!rows.length) { head.textContent = "Click a dot, draw a lasso, or choose from a list: the images appear here."; return; }
    element("b", "", head, nameOf(rows));
    element("span", "", head, describe(rows));
    const close = element("button", "clear", head, "×");
    close.title = "select nothing (esc)";
    on(close, "click", () => select([]));
    const byPerson = data.persons.length && new Set(rows.map((r) => run.label(e, r))).size === 1;
    const key = byPerson ? run.pid : (r) => run.label(e, r), word = byPerson ? "person" : "cluster", parts = new Map();
    for (const row of rows) parts.has(key(row)) ? parts.get(key(row)).push(row) : parts.set(key(row), [row]);
    let left = limit;
    for (const [k, part] of [...parts].sort((a, b) => (b[0] >= 0) - (a[0] >= 0) || b[1].length - a[1].length)) {
      if (left <= 0) break;
      const of = k < 0 ? (byPerson ? "unknown" : "outliers") : `${word} ${k}`;
      if (parts.size > 1) element("div", "group", images, `${of}: ${plural(part.length, "image")}`);
      part.slice(0, left).forEach((row) => tile(row, images));
      left -= part.length;
    }
    if (rows.length > limit) {
      const more = element("button", "more", images, `${plural(rows.length - limit, "more image")}: show ${Math.min(PAGE, rows.length - limit)}`);
      on(more, "click", () => { limit += PAGE; showSelection(); });
    }
  };

  // ---- lists
  const outlierGroups = (e) => {
    const out = run.outliers(e), ages = new Map();
    for (const row of out) ages.set(run.since(e, row), (ages.get(run.since(e, row)) || 0) + 1);
    return [[`all of them`, out.length, 0], ...[...ages].map(([k, images]) => [k === 1 ? "new in this epoch" : `for ${k} epochs`, images, k])];
  };
  const rowsOf = (which, entry) =>
    which === "outliers" ? run.outliers(state.epoch, entry[2]) : which === "split" ? run.person(entry[0]) : run.cluster(state.epoch, entry[0]);
  const showList = () => {
    for (const b of tabs.children) b.classList.toggle("pclx-on", b.dataset.tab === tab);
    list.replaceChildren();
    const entries = tab === "outliers" ? outlierGroups(state.epoch) : data.tables[tab][state.epoch], columns = LISTS[tab][1];
    const why = data.why[tab] || (entries.length ? "" : tab === "changed" && state.epoch === 0 ? "nothing before the first epoch" : "none in this epoch");
    if (why) { element("div", "why", list, why); return; }
    const table = element("table", "", list), top = element("tr", "", element("thead", "", table)), body = element("tbody", "", table);
    columns.forEach((c) => element("th", "", top, c));
    for (const entry of entries) {
      const tr = element("tr", "entry", body);
      tr.tabIndex = 0;
      tr.dataset.key = entry[0];
      columns.forEach((c, i) => {
        const td = element("td", "", tr);
        if (i === 0 && tab !== "outliers") {
          const chip = element("i", "chip", td);
          chip.style.background = toCss(tab === "split" ? theme.of("identity", run.number("identity", 0, run.person(entry[0])[0])) : theme.of("cluster", entry[0]));
        }
        td.append(typeof entry[i] === "number" ? entry[i].toLocaleString("en", { useGrouping: i > 0 }) : entry[i]);
      });
      const choose = () => select(rowsOf(tab, entry));
      on(tr, "click", choose);
      on(tr, "keydown", (ev) => { if (ev.key === "Enter") { choose(); ev.stopPropagation(); } });
      tr.rows_ = () => rowsOf(tab, entry);
    }
    markList();
  };
  const markList = () => {
    const chosen = state.selected.length && nameOf(state.selected).split(" ");
    for (const tr of list.querySelectorAll(".pclx-entry")) {
      const kind = tab === "split" ? "person" : "cluster";
      tr.classList.toggle("pclx-on", tab !== "outliers" && !!chosen && chosen[0] === kind && chosen[1] === tr.dataset.key);
    }
  };
  const showLegend = () => {
    legend.replaceChildren();
    if (state.colour !== "camera") return;
    data.cameras.forEach((c, i) => {
      const b = element("button", "key", legend);
      element("i", "chip", b).style.background = toCss(theme.of("camera", i));
      b.append(`camera ${c}`);
      on(b, "click", () => select(run.camera(c)));
    });
  };
  const showAll = () => {
    slider.value = state.epoch;
    colour.value = state.colour;
    name.textContent = `epoch ${data.epochs[state.epoch]} of ${data.epochs[run.E - 1]}`;
    bar.querySelector(".pclx-caption").textContent = data.captions[state.epoch];
    showLegend();
    showList();
    showSelection();
    paint();
  };

  // ---- hands
  const at = (ev) => { const box = canvas.getBoundingClientRect(); return [ev.clientX - box.left, ev.clientY - box.top]; };
  let drag = null;
  const hoverAt = (j, px, py) => {
    if (j === picture.hover && j < 0) return;
    const changed = j !== picture.hover;
    picture.hover = j;
    tip.style.display = j < 0 ? "none" : "flex";
    if (j < 0) { paint(); return; }
    const row = run.rows[j], c = run.label(state.epoch, row), box = plot.getBoundingClientRect();
    if (changed) {
      tip.replaceChildren();
      host.thumb(row, element("span", "photo", tip), data.names[row]);
      const text = element("div", "", tip);
      element("b", "", text, c < 0 ? "outlier" : `cluster ${c}`);
      if (run.pid(row) >= 0) element("div", "", text, `person ${run.pid(row)}`);
      if (run.camid(row) >= 0) element("div", "", text, `camera ${run.camid(row)}`);
      element("div", "file", text, data.names[row]);
    }
    tip.style.left = `${Math.max(0, Math.min(px + 14, box.width - 190))}px`;
    tip.style.top = `${Math.max(0, Math.min(py + 14, box.height - 116))}px`;
    paint();
  };
  on(canvas, "pointerdown", (ev) => {
    root.focus({ preventScroll: true });
    canvas.setPointerCapture(ev.pointerId);
    drag = { start: at(ev), move: ev.shiftKey || ev.button === 1, dx: picture.dx, dy: picture.dy, path: [at(ev)] };
    hoverAt(-1);
  });
  on(canvas, "pointermove", (ev) => {
    const [px, py] = at(ev);
    if (!drag) { hoverAt(picture.nearest(px, py), px, py); return; }
    if (drag.move) Object.assign(picture, { dx: drag.dx + px - drag.start[0], dy: drag.dy + py - drag.start[1] });
    else {
      drag.path.push([px, py]);
      picture.lasso = drag.far || Math.hypot(px - drag.start[0], py - drag.start[1]) > 5 ? drag.path : null;
      drag.far = !!picture.lasso;
    }
    paint();
  });
  on(canvas, "pointerup", (ev) => {
    if (!drag) return;
    const { move, far, path } = drag, j = picture.nearest(...at(ev));
    [drag, picture.lasso] = [null, null];
    if (far) select(picture.inside(path).map((k) => run.rows[k]));
    else if (!move) select(j < 0 ? [] : clusterOf(run.rows[j]));
    paint();
  });
  on(canvas, "pointercancel", () => { [drag, picture.lasso] = [null, null]; paint(); });
  on(canvas, "pointerleave", () => { if (!drag) hoverAt(-1); });
  on(canvas, "dblclick", () => { picture.zoomAt(0, 0, 0); paint(); });
  on(canvas, "wheel", (ev) => { // in a notebook the wheel scrolls until the explorer was clicked
    if (!host.keys && !ev.ctrlKey && !root.contains(document.activeElement)) return;
    ev.preventDefault();
    picture.zoomAt(Math.exp(-ev.deltaY / 500), ...at(ev));
    paint();
  }, { passive: false });
  on(slider, "input", () => { setPlaying(false); goTo(+slider.value); });
  on(colour, "change", () => { state.colour = colour.value; host.changed(state); showAll(); });
  on(play, "click", () => setPlaying(!playing));
  on(host.keys || root, "keydown", (ev) => {
    if (ev.target === colour || ev.ctrlKey || ev.metaKey || ev.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[ev.key];
    if (step) { setPlaying(false); goTo(state.epoch + step); }
    else if (ev.key === " " && ev.target.tagName !== "BUTTON") setPlaying(!playing);
    else if (ev.key === "Escape") select([]);
    else return;
    ev.preventDefault();
    ev.stopPropagation();
  });
  const restyle = () => { readTheme(); showAll(); };
  const watch = new ResizeObserver(paint), dark = window.matchMedia("(prefers-color-scheme: dark)"), themed = new MutationObserver(restyle);
  watch.observe(canvas);
  on(dark, "change", restyle);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  readTheme();
  picture.resize();
  select(state.selected, false);
  showAll();
  return {
    set(news) { // what Python says
      if (news.colour !== undefined && news.colour !== state.colour) { state.colour = news.colour; showAll(); }
      if (news.epoch !== undefined) goTo(news.epoch, false);
      if (news.selected !== undefined && String(news.selected) !== String(state.selected)) select(news.selected, false);
    },
    destroy() { stop.abort(); watch.disconnect(); themed.disconnect(); cancelAnimationFrame(frame); root.replaceChildren(); },
  };
}

// ---------------------------------------------------------------- arrays and thumbnails

const TYPES = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array };

function unpack(meta, bytes) { // bytes: an ArrayBuffer per array of meta.packed
  const arrays = {};
  meta.packed.forEach(({ name, dtype }, i) => (arrays[name] = new TYPES[dtype](bytes[i])));
  const palettes = {};
  for (const how of meta.colours) palettes[how] = arrays["palette_" + how];
  return { ...meta, arrays, palettes };
}

function missing(el, name) { el.classList.add("pclx-missing"); el.textContent = name; }

// Home 1: Jupyter. Python answers {type: "ready"} with the data and {type: "thumbs", rows} with JPEG files, empty if unreadable.
function render({ model: remote, el }) {
  el.classList.add("pclx-home");
  const root = element("div", "", el), urls = new Map(), waiting = new Map();
  let view = null, asked = null, meta = null;
  const ask = () => { asked = null; remote.send({ type: "thumbs", rows: [...waiting.keys()].filter((r) => !urls.has(r)) }); };
  const fill = (row, box, name) => {
    if (urls.get(row)) box.style.backgroundImage = `url(${urls.get(row)})`;
    else missing(box, name);
  };
  const thumb = (row, box, name) => {
    if (urls.has(row)) { fill(row, box, name); return; }
    waiting.set(row, [...(waiting.get(row) || []), [box, name]]);
    asked = asked || setTimeout(ask, 30);
  };
  const state = () => ({ epoch: meta.epochs.indexOf(remote.get("epoch")), colour: remote.get("colour"), selected: remote.get("selected") });
  const changed = (s) => {
    remote.set({ epoch: meta.epochs[s.epoch], colour: s.colour, selected: s.selected });
    remote.save_changes();
  };
  const got = (message, buffers) => {
    const bytes = buffers.map((b) => b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));
    if (message.type === "data" && !view) {
      meta = message.meta;
      view = mount(root, unpack(meta, bytes), { state: state(), changed, thumb });
    } else if (message.type === "thumbs") {
      message.rows.forEach((row, i) => {
        if (!urls.has(row)) urls.set(row, bytes[i].byteLength ? URL.createObjectURL(new Blob([bytes[i]], { type: "image/jpeg" })) : "");
        for (const [box, name] of waiting.get(row) || []) fill(row, box, name);
        waiting.delete(row);
      });
    }
  };
  const told = () => view && view.set(state());
  root.textContent = "The run is being read…";
  remote.on("msg:custom", got);
  for (const name of ["epoch", "colour", "selected"]) remote.on("change:" + name, told);
  remote.send({ type: "ready" });
  return () => {
    remote.off("msg:custom", got);
    for (const name of ["epoch", "colour", "selected"]) remote.off("change:" + name, told);
    if (view) view.destroy();
    for (const url of urls.values()) if (url) URL.revokeObjectURL(url);
  };
}

// Home 2: a page. Arrays and sheets of thumbnails are base64 in <script type="text/plain"> elements.
function openPage(root) {
  const text = (id) => document.getElementById(id).textContent;
  const bytes = (id) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text(id));
    const binary = atob(text(id)), out = new Uint8Array(binary.length);
    for (let i = 0; i < out.length; i++) out[i] = binary.charCodeAt(i);
    return out;
  };
  const meta = JSON.parse(text("pclx-meta"));
  const data = unpack(meta, meta.packed.map(({ name }) => bytes("pclx-" + name).buffer)), sheets = new Map();
  const url = (s) => {
    if (!sheets.has(s)) sheets.set(s, URL.createObjectURL(new Blob([bytes("pclx-sheet-" + s)], { type: "image/jpeg" })));
    return sheets.get(s);
  };
  const thumb = (row, box, name) => {
    const slot = data.arrays.slots[row], { across, down } = meta.sheets;
    if (slot < 0) { missing(box, name); return; }
    const place = slot % (across * down), x = place % across, y = Math.floor(place / across);
    box.style.backgroundImage = `url(${url(Math.floor(slot / (across * down)))})`;
    box.style.backgroundSize = `${100 * across}% ${100 * down}%`;
    box.style.backgroundPosition = `${across > 1 ? (100 * x) / (across - 1) : 0}% ${down > 1 ? (100 * y) / (down - 1) : 0}%`;
  };
  return mount(root, data, { state: { epoch: meta.epochs.length - 1 }, changed: () => {}, thumb, keys: document });
}

export default { render };
