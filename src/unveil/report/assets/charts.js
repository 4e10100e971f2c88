// Figures of the page: line charts (uPlot), training curves and the map of guess accuracy.
// page.py joins this file and app.js, in this order, into one module; the helpers and `data` come from app.js.

// Line charts

const drawings = []; // every function that paints with colours of the theme; all run again when it changes
const plots = new Map(); // host element -> uPlot

/**
 * Draws lines {label, x, y, low?, high?, colour, dash?, dots?, smooth?, right?} into the host; `right` is the share-of-all
 * axis on that side. The options: title, note?, percent?, range?, level? (a reference line), x (name of the horizontal
 * axis), y? and right? (names of the others), marks? (a function: [{x, text?}], upright lines), digits? (of values).
 */
function lineChart(host, lines, options) {
  const show = (value, line) => (line?.right || options.percent ? percent(value) : number(value, options.digits));
  const tables = [[[]]];
  const series = [{ label: options.x, value: (plot, x) => number(x ?? plot.data[0].at(-1)) }];
  const bands = [];
  const add = (x, y, settings) => {
    tables.push([x, y]);
    series.push({ spanGaps: false, points: { show: false }, ...settings });
    return series.length - 1;
  };
  for (const line of lines) {
    const stroke = colour(line.colour);
    if (line.low && line.high) {
      const edge = { class: "edge", width: 0, stroke: "transparent", scale: line.right ? "right" : "y" };
      bands.push({ series: [add(line.x, line.high, edge), add(line.x, line.low, edge)], fill: `${stroke}26` });
    }
    const scale = line.right ? "right" : "y";
    if (line.smooth > 1) add(line.x, line.y, { class: "edge", width: 1, stroke: `${stroke}4d`, scale });
    const y = line.smooth > 1 ? runningMean(line, line.smooth) : line.y;
    const text = (index) => {
      if (y[index] == null) return "–";
      const interval = line.interval && line.low?.[index] != null && line.high?.[index] != null;
      return show(y[index], line) + (interval ? ` (${show(line.low[index], line)} to ${show(line.high[index], line)})` : "");
    };
    const value = (plot, _, __, index) => text(index == null ? y.length - 1 : line.x.indexOf(plot.data[0][index]));
    add(line.x, y, { label: line.label, stroke, scale, width: 1.75, dash: line.dash, value, points: { show: !!line.dots && y.length < 33, size: 5, fill: stroke } });
  }
  const axis = { stroke: colour("soft"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "12px sans-serif", labelFont: "12px sans-serif", labelSize: 18, labelGap: 0 };
  const upright = { ...axis, gap: 6, space: 34, size: (_, ticks) => 12 + 7 * Math.max(2, ...(ticks ?? []).map((tick) => tick.length)) };
  const right = lines.some((line) => line.right);
  const settings = {
    width: host.clientWidth || 320,
    height: options.height ?? 205,
    scales: { x: { time: false }, y: { range: (_, low, high) => options.range ?? padded(low, high) }, right: { range: (_, low, high) => padded(low, high, 1) } },
    axes: [
      { ...axis, size: 26, gap: 4, space: 60, label: options.x, values: (_, ticks) => ticks.map((tick) => (tick % 1 ? "" : number(tick))) },
      { ...upright, label: options.y, values: (_, ticks) => tickTexts(ticks, options.percent) },
      ...(right ? [{ ...upright, scale: "right", side: 1, label: options.right, labelSize: 24, labelGap: 4, grid: { show: false }, values: (_, ticks) => tickTexts(ticks, true) }] : []),
    ],
    series, bands,
    padding: [8, right ? 4 : 16, 0, 0],
    cursor: { y: false, drag: { x: true, y: false }, sync: options.x === "update" ? { key: "updates" } : undefined },
    hooks: { draw: [(plot) => {
      if (options.level != null) drawLine(plot, "y", options.level, "soft");
      for (const mark of options.marks?.() ?? []) drawLine(plot, "x", mark.x, mark.text ? "wrong" : "soft", mark.text);
    }] },
  };
  plots.get(host)?.destroy();
  plots.set(host, new uPlot(settings, uPlot.join(tables), host));
  const spoken = lines.map((line) => `${line.label}: ${show(line.y.find((y) => y != null), line)} at first, ${show(line.y.findLast((y) => y != null), line)} at last`);
  host.setAttribute("role", "img");
  host.setAttribute("aria-label", `${options.title}. ${spoken.join("; ")}.`);
}

function padded(low, high, most = Infinity) {
  if (low == null) return [0, 1];
  const pad = 0.07 * (high - low || Math.abs(high) || 1);
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high <= most ? Math.min(most, high + pad) : high + pad];
}

/** Ticks as text, all with as many digits as their distance needs. */
function tickTexts(ticks, inPercent) {
  const values = ticks.map((tick) => (inPercent ? 100 * tick : tick));
  const largest = Math.max(...values.map(Math.abs));
  const gap = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0] ?? 1) || 1;
  let digits = Math.max(0, -Math.floor(Math.log10(gap) + 1e-9));
  if (Math.abs(gap * 10 ** digits - Math.round(gap * 10 ** digits)) > 1e-3) digits++; // 0.25
  return values.map((value) => {
    if (inPercent) return `${value.toFixed(digits)}%`;
    if (digits > 5 && value && largest < 1e-3) return value.toExponential(Math.max(0, Math.ceil(Math.log10(Math.abs(value) / gap) - 1e-9)));
    if (Math.abs(value) >= 1e5) return value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 4 });
    return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  });
}

/** A dashed line across the plot: level at a y, or upright at an x, with a word beside it. */
function drawLine(plot, scale, value, ink, text) {
  const [context, at, box, pixel] = [plot.ctx, plot.valToPos(value, scale, true), plot.bbox, devicePixelRatio];
  if (scale === "x" && (at < box.left || at > box.left + box.width)) return; // outside of what is zoomed in on
  context.save();
  context.strokeStyle = context.fillStyle = colour(ink);
  context.setLineDash([2 * pixel, 4 * pixel]);
  context.beginPath();
  context.moveTo(scale === "x" ? at : box.left, scale === "x" ? box.top : at);
  context.lineTo(scale === "x" ? at : box.left + box.width, scale === "x" ? box.top + box.height : at);
  context.stroke();
  if (text) {
    const late = at > box.left + 0.6 * box.width;
    context.font = `${12 * pixel}px sans-serif`;
    context.textAlign = late ? "right" : "left";
    context.fillText(text, at + (late ? -6 : 6) * pixel, box.top + 12 * pixel);
  }
  context.restore();
}

/** Mean of y over the `window` updates around every x. */
function runningMean({ x, y }, window) {
  let [start, end, sum, count] = [0, 0, 0, 0];
  return x.map((middle, index) => {
    for (; x[end] < middle + window / 2; end++) if (y[end] != null) [sum, count] = [sum + y[end], count + 1];
    for (; x[start] < middle - window / 2; start++) if (y[start] != null) [sum, count] = [sum - y[start], count - 1];
    return count && y[index] != null ? sum / count : null;
  });
}

/** A titled figure below `parent` whose chart is drawn again when the theme changes. `lines` is called at each drawing. */
function figure(parent, options, lines) {
  const host = make("div");
  const caption = make("figcaption", {}, make("h3", {}, options.title), options.note ? make("small", {}, options.note) : null);
  parent.append(make("figure", {}, caption, host));
  const draw = () => lineChart(host, lines(), { x: "update", ...options });
  drawings.push(draw);
  new ResizeObserver(() => plots.get(host)?.setSize({ width: host.clientWidth, height: options.height ?? 205 })).observe(host);
  return { caption, draw };
}

// Training curves

let smoothing = 1;
const inTraining = (key, label, colour, more = {}) =>
  data.train[key] ? [{ ...data.train[key], label, colour, smooth: smoothing, ...more }] : [];
const heldOut = (key) => Object.entries(data.evals).filter(([, curve]) => curve[key]).map(([decoder, curve], index) => ({
  x: curve.x, y: curve[key], ...interval(curve, key),
  label: `held-out, ${decoder}`, colour: `c${1 + (index % 5)}`, dots: true, dash: index % 2 ? [7, 4] : undefined,
}));

/** The 95 % interval of a held-out number, where one was logged. */
function interval(curve, key) {
  if (key === "accuracy" && curve.low && curve.high) return { low: curve.low, high: curve.high, interval: true };
  const error = key.startsWith("reward") && curve[key.replace("reward", "reward_error")];
  if (!error) return {};
  const edge = (sign) => curve[key].map((y, i) => (y == null || error[i] == null ? null : y + sign * 1.96 * error[i]));
  return { low: edge(-1), high: edge(1), interval: true };
}

function ratio() {
  const [mean, spread] = [data.train.ratio_mean, data.train.ratio_std];
  const paired = mean && spread && mean.x.length === spread.x.length;
  const edge = (sign) => (paired ? mean.y.map((y, i) => (y == null || spread.y[i] == null ? null : y + sign * spread.y[i])) : mean?.low);
  return inTraining("ratio_mean", paired ? "mean ± std" : "mean", "c1", { low: edge(-1), high: edge(1) });
}

const moves = () => (data.train.reference_moved?.x ?? []).filter((_, i) => data.train.reference_moved.y[i] > 0).map((x) => ({ x }));

const trainingCharts = () => [
  [{ title: "Reward", note: "training" }, () => [...inTraining("reward", "reward", "c1"), ...inTraining("score", "score", "c3")]],
  [{ title: "Over-denoising", note: "right on the way, wrong at the end", percent: true },
    () => [...inTraining("over_denoising", "training", "c0"), ...heldOut("over_denoising")]],
  [{ title: "Groups without variance", note: "share of all groups", percent: true, range: [0, 1], level: data.groups.limit },
    () => inTraining("zero_variance_groups", "share", "c2")],
  [{ title: "Reward spread in a group", note: "std" }, () => inTraining("group_reward_std", "std", "c2")],
  [{ title: isImages ? "Distance from the reference" : "KL to the reference", note: moves().length ? "dashed: the reference moved" : null, marks: moves }, () => inTraining("kl", "kl", "c4")],
  [{ title: "Distance from the old policy", note: "mean square of v − v_old" }, () => inTraining("old_deviation", "distance", "c1")],
  [{ title: "Held by the gate", note: "share of the samples", percent: true }, () => inTraining("gate/held", "held", "c2")],
  [{ title: "Importance ratio", level: 1, digits: 6 }, ratio],
  [{ title: "Clipped terms", note: "share", percent: true }, () => [...inTraining("clip_low", "below", "c1"), ...inTraining("clip_high", "above", "c2", { dash: [7, 4] })]],
  [{ title: "Gradient norm" }, () => inTraining("grad_norm", "norm", "c3")],
  [{ title: "Entropy" }, () => inTraining("entropy", "entropy", "c4")],
];

function drawCurves() {
  const updates = Math.max(0, ...Object.values(data.train).map((curve) => curve.x.length));
  const accuracy = () => [...inTraining("accuracy", "training", "c0"), ...heldOut("accuracy")];
  smoothing = updates > 1500 ? 100 : updates > 300 ? 20 : updates > 60 ? 5 : 1;
  if (accuracy().length) figure(byId("result-charts"), { title: "Accuracy", note: "held-out with intervals", percent: true, height: 270 }, accuracy);
  const windows = [1, 5, 20, 100].filter((window) => window < Math.max(2, updates / 3));
  const select = fillSelect(byId("smooth"), windows.map((n) => [String(n), n === 1 ? "no mean" : `${n} updates`]), String(smoothing));
  select.addEventListener("change", () => {
    smoothing = Number(select.value);
    drawings.forEach((draw) => draw());
  });
  if (!updates) {
    byId("training").querySelector(".controls").hidden = true;
    byId("charts").append(make("p", { class: "empty" }, "No training lines in metrics.jsonl yet."));
    return;
  }
  for (const [options, lines] of trainingCharts()) if (lines().length) figure(byId("charts"), options, lines);
  drawAnyMeasure();
  const groups = data.groups;
  if (groups.flat)
    byId("group-warning").append(make("p", { class: "warning", role: "status" },
      `In ${groups.flat} of ${groups.updates} updates (the last: ${groups.last}) more than ${percent(groups.limit, 0)} of the groups had ` +
      "no variance in reward. Such a group has no advantage: harder or easier problems, or larger groups, would teach more."));
}

/** One chart for any key of the training lines; the loss first, then keys that no other chart shows. */
function drawAnyMeasure() {
  const shown = ["reward", "score", "accuracy", "over_denoising", "zero_variance_groups", "group_reward_std", "kl", "old_deviation", "gate/held",
    "ratio_mean", "clip_low", "clip_high", "grad_norm", "entropy"];
  const rank = (key) => (key === "loss" ? 0 : shown.includes(key) ? 2 : 1);
  const keys = Object.keys(data.train).sort((a, b) => rank(a) - rank(b));
  const select = fillSelect(make("select", { "aria-label": "Measure", id: "measure" }), keys.map((key) => [key, key]), keys[0]);
  const { caption, draw } = figure(byId("charts"), { title: "Any measure" }, () => inTraining(select.value, select.value, "c0"));
  caption.append(select);
  select.addEventListener("change", draw);
}

// Guess accuracy: update x denoising step

/** Colour of v in [0, 1] on the ramp of the theme: lightness is monotone in v, also without colour vision. */
function ramp(v) {
  const stops = [0, 1, 2, 3, 4].map((stop) => colour(`r${stop}`));
  const at = Math.min(3.999, Math.max(0, v) * 4);
  const part = (hex, channel) => parseInt(hex.slice(1 + 2 * channel, 3 + 2 * channel), 16);
  return [0, 1, 2].map((c) => Math.round(part(stops[Math.floor(at)], c) * (1 - (at % 1)) + part(stops[Math.floor(at) + 1], c) * (at % 1)));
}
const rgb = (v) => `rgb(${ramp(v).join(" ")})`;
const rampImage = () => `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(rgb).join(", ")})`;

function drawGuesses() {
  const map = data.guesses;
  if (!map) {
    byId("guesses").hidden = byId("guesses-link").hidden = isImages;
    byId("guess-body").append(make("p", { class: "empty" }, "The training lines hold no guess_accuracy."));
    return;
  }
  const [columns, steps] = [map.values.length, map.values[0].length];
  const values = map.values.flat().filter((value) => value != null);
  const [least, most] = [values.reduce((a, b) => Math.min(a, b), 1), values.reduce((a, b) => Math.max(a, b), 0)];
  const canvas = make("canvas", { width: columns, height: steps, tabindex: "0", role: "img",
    "aria-label": `Guess accuracy for ${columns} spans of updates and ${steps} denoising steps. Arrow keys read single cells.` });
  const scale = make("i");
  const readout = make("span", { "aria-live": "polite" }, "Point at a cell to read it.");
  const legend = make("span", {}, percent(least, 0), scale, percent(most, 0));
  byId("guess-body").append(make("figure", {}, make("figcaption", {}, make("h3", {}, "Denoising step × update")),
    make("div", { class: "map" }, make("div", { class: "y" }, make("span", {}, `step ${steps}`), make("span", {}, "step 1")), canvas,
      make("div", { class: "x" }, make("span", {}, `update ${map.from[0]}`), make("span", {}, `update ${map.to.at(-1)}`)),
      make("div", { class: "readout" }, readout, legend))));
  const span = (first, last) => (map.from[first] === map.to[last] ? `update ${map.from[first]}` : `updates ${map.from[first]}–${map.to[last]}`);
  const cell = { column: columns - 1, step: steps - 1 };
  const read = (column, step) => {
    cell.column = Math.min(columns - 1, Math.max(0, column));
    cell.step = Math.min(steps - 1, Math.max(0, step));
    readout.textContent = `${span(cell.column, cell.column)}, step ${cell.step + 1}: ${percent(map.values[cell.column][cell.step])}`;
  };
  canvas.addEventListener("pointermove", (event) => read(Math.floor((event.offsetX / canvas.clientWidth) * columns),
    steps - 1 - Math.floor((event.offsetY / canvas.clientHeight) * steps)));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    read(cell.column + move[0], cell.step + move[1]);
  });
  drawings.push(() => {
    const context = canvas.getContext("2d");
    scale.style.background = rampImage();
    map.values.forEach((column, x) => column.forEach((value, step) => {
      context.fillStyle = value == null ? colour("track") : rgb((value - least) / (most - least || 1));
      context.fillRect(x, steps - 1 - step, 1, 1);
    }));
  });
  const part = Math.max(1, Math.floor(columns / 8));
  const mean = (from) => map.values[0].map((_, step) => {
    const known = map.values.slice(from, from + part).map((column) => column[step]).filter((value) => value != null);
    return known.length ? known.reduce((a, b) => a + b) / known.length : null;
  });
  const [x, first, last] = [map.values[0].map((_, step) => step + 1), mean(0), mean(columns - part)];
  const { caption } = figure(byId("guess-body"), { title: "Along the steps", percent: true, height: 240, x: "denoising step" }, () => [
    { x, y: first, label: span(0, part - 1), colour: "c0", dots: true, dash: [7, 4] },
    ...(columns > 1 ? [{ x, y: last, label: span(columns - part, columns - 1), colour: "c1", dots: true }] : []),
  ]);
  const best = last.reduce((top, value, step) => (value > last[top] ? step : top), 0);
  const drop = last[best] - last[steps - 1];
  caption.append(make("small", {}, drop > 0.005 ? `last updates: best at step ${best + 1}, ${(100 * drop).toFixed(1)} points lower at the end` : "last updates: best at the end"));
}
