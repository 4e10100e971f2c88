// The page of one run: reads the JSON in #data and fills the sections of template.html. Joined to charts.js by page.py.
// Whatever comes from the run reaches the page as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const isImages = data.samples.some((sample) => sample.image) || data.trajectories.some((one) => one.steps[0]?.image);
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const unique = (values) => [...new Set(values)];

/** An element; attributes that are functions become listeners, children that are strings become text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, selected: value === chosen }, text)));
  return select;
}

// Numbers as text

const percent = (value, digits = 1) => (value == null ? "–" : `${(100 * value).toFixed(digits)}%`);

function number(value, digits = 4) {
  if (typeof value !== "number") return "–";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  if (Number.isInteger(value)) return String(value);
  return size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

const shortScore = (value) => (typeof value === "number" ? String(Number(value.toFixed(2))) : "–");

function duration(seconds) {
  if (typeof seconds !== "number") return "–";
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${number(Math.round(seconds * 10) / 10)} s`;
}

// Header and recipe

function drawHeader() {
  const run = data.run;
  byId("system").textContent = run.system ?? "run";
  byId("name").textContent = run.name;
  const status = String(run.status ?? "unknown");
  byId("facts").append(
    make("span", { class: `status ${/^\w+$/.test(status) ? status : ""}` }, status),
    ...(run.seed == null ? [] : [make("span", {}, `seed ${run.seed}`)]),
    ...(run.started == null ? [] : [make("span", {}, `started ${String(run.started).slice(0, 16).replace("T", " ")}`)]),
  );
  byId("summary").append(...data.summary.map((sentence) => make("p", {}, sentence)));
  if (data.hacking.length) {
    const others = data.hacking.slice(1).map(({ decoder }) => decoder);
    byId("alerts").append(make("p", { class: "warning", role: "status" }, `${data.hacking[0].sentence} `,
      others.length ? `Likewise with ${others.join(", ")}. ` : "", make("a", { href: "#watched" }, "Look")));
  }
  const titles = { optimizer_steps: "optimiser steps", forwards: "denoiser forwards", seconds: "time" };
  for (const [key, value] of Object.entries(run.cost ?? {})) {
    const text = key === "seconds" ? duration(value) : number(value);
    byId("cost").append(make("div", {}, make("dt", {}, titles[key] ?? key.replaceAll("_", " ")), make("dd", {}, text)));
  }
  byId("notes").hidden = !data.notes.length;
  byId("notes").append(...data.notes.map((note) => make("li", {}, note)));
  byId("command").textContent = run.command ?? "";
  byId("recipe-text").textContent = data.recipe ?? "This run folder has no recipe.yaml.";
  for (const [key, value] of Object.entries(run.versions ?? {}))
    byId("versions").append(make("dt", {}, key), make("dd", {}, String(value)));
  if (!Object.keys(run.versions ?? {}).length) byId("versions").parentElement.hidden = true;
}

// The table of models by decoders

function drawTable() {
  const table = data.table;
  if (!table) {
    byId("table").append(make("p", { class: "empty" }, "No final table yet: the run writes table.json at its end."));
    return;
  }
  const all = [table.accuracy, table.low, table.high].flat(2).filter((value) => value != null);
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const place = (value) => `${(100 * (value - least)) / (most - least || 1)}%`;
  const cell = (row, column) => {
    const [value, low, high] = [table.accuracy, table.low, table.high].map((part) => part?.[row]?.[column]);
    const td = make("td", {}, make("b", {}, percent(value)));
    if (value == null || low == null || high == null) return td;
    const [span, dot] = [make("i"), make("b")];
    Object.assign(span.style, { left: place(low), right: `calc(100% - ${place(high)})` });
    dot.style.left = place(value);
    td.append(make("span", { class: "range", "aria-hidden": "true" }, span, dot),
      make("small", {}, `${(100 * low).toFixed(1)}–${percent(high)}`));
    return td;
  };
  const last = table.rows.length - 1;
  const change = (column) => {
    const [base, tuned] = [table.accuracy[0][column], table.accuracy[last][column]];
    if (base == null || tuned == null) return make("td", {}, "–");
    return make("td", {}, `${tuned < base ? "−" : "+"}${Math.abs(100 * (tuned - base)).toFixed(1)} points`);
  };
  const head = make("tr", {}, make("th", { scope: "col" }, "model"),
    ...table.columns.map((name) => make("th", { scope: "col" }, String(name))));
  const rows = table.rows.map((name, row) =>
    make("tr", {}, make("th", { scope: "row" }, String(name)), ...table.columns.map((_, column) => cell(row, column))));
  if (last > 0)
    rows.push(make("tr", {}, make("th", { scope: "row" }, "change"), ...table.columns.map((_, column) => change(column))));
  const caption = `Held-out accuracy by decoder${table.problems ? ` on ${number(table.problems)} problems` : ""}, with intervals.`;
  byId("table").append(make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...rows)));
}

// Samples

function drawSamples() {
  const body = byId("sample-body");
  const updates = unique(data.samples.map((sample) => sample.step));
  if (!updates.length) {
    body.append(make("p", { class: "empty" }, "This run has no samples.jsonl."));
    return;
  }
  const options = updates.map((step) => [String(step), `update ${step}`]);
  const decoders = unique(data.samples.map((sample) => sample.decoder ?? "default"));
  const choice = (label, entries, chosen) => {
    const select = fillSelect(make("select", { change: () => draw(false) }), entries, chosen);
    return [select, make("label", {}, label, select)];
  };
  const [from, fromLabel] = choice("Compare", options, String(updates[0]));
  const [to, toLabel] = choice("with", options, String(updates.at(-1)));
  const [decoder, decoderLabel] = choice("Decoder", decoders.map((name) => [name, name]), decoders[0]);
  const [filter, filterLabel] = choice("Show", [["all", "all problems"], ["gained", "became right"], ["lost", "became wrong"], ["wrong", "wrong in both"]], "all");
  Object.assign(from, { id: "sample-from" });
  Object.assign(to, { id: "sample-to" });
  Object.assign(filter, { id: "sample-filter" });
  decoderLabel.hidden = decoders.length < 2;
  const count = make("p", { class: "hint", role: "status" });
  const table = make("table", { class: "samples" });
  const more = make("button", { type: "button", click: () => draw(true) }, "Show all");
  body.append(make("div", { class: "controls" }, fromLabel, toLabel, decoderLabel, filterLabel), count, table, more);
  const kinds = { gained: (a, b) => !a?.correct && b?.correct, lost: (a, b) => a?.correct && b && !b.correct, wrong: (a, b) => a && b && !a.correct && !b.correct, all: () => true };
  const answer = (label, sample) => make("td", { "data-label": label }, ...(sample
    ? [mark(sample.correct), make("span", { class: "mono" }, String(sample.completion ?? "")),
      sample.score == null ? null : make("small", {}, `score ${shortScore(sample.score)}`)] : ["–"]));
  function draw(whole) {
    const found = data.samples.filter((sample) => (sample.decoder ?? "default") === decoder.value);
    const at = (step) => new Map(found.filter((sample) => String(sample.step) === step).map((sample) => [sample.problem, sample]));
    const [before, after] = [at(from.value), at(to.value)];
    const problems = unique([...before.keys(), ...after.keys()]).filter((id) => kinds[filter.value](before.get(id), after.get(id)));
    const rows = problems.slice(0, whole ? problems.length : 50).map((id) => make("tr", {},
      make("th", { scope: "row", title: id, class: "mono" }, String((after.get(id) ?? before.get(id)).prompt ?? id)),
      answer(`update ${from.value}`, before.get(id)), answer(`update ${to.value}`, after.get(id))));
    const right = (samples) => [...samples.values()].filter((sample) => sample.correct).length;
    count.textContent = `${right(before)} of ${before.size} right at update ${from.value}, ${right(after)} of ${after.size} at update ${to.value}; ${problems.length} shown by this choice.`;
    more.hidden = rows.length === problems.length;
    const head = ["problem", `update ${from.value}`, `update ${to.value}`].map((text) => make("th", { scope: "col" }, text));
    table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  }
  draw(false);
}

function mark(correct) {
  if (correct == null) return make("span", { class: "mark" }, "");
  return make("span", { class: `mark ${correct ? "yes" : "no"}`, role: "img", "aria-label": correct ? "right" : "wrong" }, correct ? "✓" : "✗");
}

// Denoising trajectories

const view = { problem: null, panels: [], timer: null };
const outcome = (trajectory) => {
  const right = trajectory.steps.flatMap((step, index) => (step.correct ? [index + 1] : []));
  const final = trajectory.steps.at(-1)?.correct;
  return { right, final, over: final === false && right.length > 0 };
};
const find = (problem, update, decoder) =>
  data.trajectories.find((one) => one.problem === problem && String(one.step) === String(update) && one.decoder === decoder);

/** Confidence behind the token that stands at each place: that of its last prediction, kept while the token stays. */
function standing(trajectory) {
  const kept = [];
  return trajectory.steps.map((step) => step.tokens.map((token, place) => {
    const fresh = step.confidence?.[place];
    if (token == null) kept[place] = null;
    else if (fresh != null && (step.guess == null || step.guess[place] === token)) kept[place] = fresh;
    return kept[place] ?? null;
  }));
}

/** A token as it is shown: line breaks and tabs as signs, and blanks too where there is nothing else. */
const visible = (token) => {
  const text = String(token).replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return text === "" ? "∅" : text.trim() || text.replaceAll(" ", "␣");
};

/** Ascending numbers as text with ranges: 1, 4–6. */
function ranges(numbers) {
  const spans = [];
  for (const one of numbers) {
    if (spans.length && spans.at(-1)[1] === one - 1) spans.at(-1)[1] = one;
    else spans.push([one, one]);
  }
  return spans.map(([first, last]) => (first === last ? first : `${first}–${last}`)).join(", ");
}

function tokenBox(trajectory, index, place) {
  const [step, before] = [trajectory.steps[index], trajectory.steps[index - 1]];
  const [token, guess] = [step.tokens[place], step.guess?.[place]];
  const taken = (step.taken_back ?? []).includes(place);
  const revealed = !taken && (step.revealed ?? []).includes(place);
  const box = make("li", { class: `token${token == null ? " masked" : ""}${revealed ? " revealed" : ""}${taken ? " taken" : ""}` });
  box.style.minWidth = `calc(${trajectory.widths[place]}ch + var(--pad))`;
  const confidence = token == null ? step.confidence?.[place] : trajectory.standing[index][place];
  const old = taken ? before?.tokens[place] ?? guess : null;
  if (old != null) box.append(make("del", {}, visible(old)));
  if (token != null) {
    box.append(visible(token));
    if (confidence != null && !taken) {
      const fill = ramp(confidence);
      const light = fill.map((part) => (part / 255) ** 2.2).reduce((sum, part, c) => sum + part * [0.2126, 0.7152, 0.0722][c], 0);
      Object.assign(box.style, { background: `rgb(${fill.join(" ")})`, color: light > 0.18 ? "#101418" : "#ffffff", borderColor: "transparent" });
    }
  } else if (!taken && guess != null && byId("show-guesses").checked) box.append(make("span", {}, visible(guess)));
  const state = taken ? `taken back, was ${old}` : token == null ? `masked${guess == null ? "" : `, guess ${guess}`}` : `${token}${revealed ? ", newly revealed" : ""}`;
  const text = `place ${place + 1}: ${state}${confidence == null ? "" : `, confidence ${confidence.toFixed(2)}`}`;
  box.title = text;
  box.setAttribute("aria-label", text);
  return box;
}

function verdict(trajectory) {
  const { right, final, over } = outcome(trajectory);
  const steps = `${right.length === 1 ? "step" : "steps"} ${ranges(right)}`;
  if (over) return make("p", { class: "verdict over" }, `${isImages ? "Lost on the way" : "Over-denoised"}: right at ${steps}, wrong at the end.`);
  if (final == null) return make("p", { class: "verdict" }, "Not judged.");
  if (!final) return make("p", { class: "verdict" }, "Wrong at every step.");
  return make("p", { class: "verdict" }, `Right at the end${right.length ? `, first at step ${right[0]}` : ""}.`);
}

/** One bar per step, as high as the score; a click goes there. The sentence below it says the same for a screen reader. */
function strip(trajectory) {
  const bars = trajectory.steps.map((step, index) => {
    const bar = make("i");
    bar.style.height = `${6 + 34 * (step.score ?? (step.correct ? 1 : 0.3))}px`;
    const kind = step.correct == null ? "unknown" : step.correct ? "yes" : "no";
    return make("div", { class: kind, title: `step ${index + 1}: ${kind === "yes" ? "right" : "wrong"}, score ${shortScore(step.score)}`,
      click: () => goTo(index + 1) }, bar, mark(step.correct));
  });
  return make("div", { class: `strip${bars.length > 24 ? " dense" : ""}`, "aria-hidden": "true" }, ...bars);
}

/** The panel of one choice {update, decoder}: its controls, and `draw(step)` for what changes with the step. */
function panel(choice, label) {
  const pick = (key, values, text) => fillSelect(make("select", { "aria-label": `${key} of ${label}`, change: (event) => {
    choice[key] = event.target.value;
    drawPanels();
  } }), values.map((value) => [String(value), text(value)]), String(choice[key]));
  const [updates, decoders] = ["step", "decoder"].map((key) => unique(data.trajectories.map((one) => one[key])));
  const node = make("article", { class: "panel", "aria-label": `trajectory ${label}` }, make("div", { class: "controls" }, make("h3", {}, label),
    make("label", {}, "update", pick("update", updates, (step) => (step === 0 ? "0 (base)" : String(step)))),
    make("label", {}, "decoder", pick("decoder", decoders, String))));
  const trajectory = find(view.problem, choice.update, choice.decoder);
  if (!trajectory?.steps.length) {
    node.append(make("p", { class: "empty" }, "No trajectory for this choice."));
    return { node, length: 1, draw() {} };
  }
  const bars = strip(trajectory);
  const content = trajectory.steps[0].image ? pictures(trajectory, label) : canvas(trajectory, label);
  node.append(bars, verdict(trajectory), ...content.nodes);
  const draw = (wanted) => {
    const index = Math.min(wanted, trajectory.steps.length) - 1;
    content.draw(index);
    [...bars.children].forEach((bar, place) => bar.classList.toggle("now", place === index));
    const { correct } = trajectory.steps[index];
    return `${label} ${correct == null ? "not judged" : correct ? "right" : "wrong"}`;
  };
  return { node, length: trajectory.steps.length, draw };
}

/** The canvas of a trajectory of tokens, and the guess at a step in words. */
function canvas(trajectory, label) {
  trajectory.standing ??= standing(trajectory);
  trajectory.widths ??= trajectory.steps[0].tokens.map((_, place) => Math.min(16, Math.max(1,
    ...trajectory.steps.map((step) => Math.max(visible(step.tokens[place] ?? "").length, visible(step.guess?.[place] ?? "").length)))));
  const dense = trajectory.widths.length > 64 ? " dense" : "";
  const tokens = make("ol", { class: `tokens${dense}`, "aria-label": `canvas of ${label}` });
  const guess = make("dl", { class: "guess" });
  const draw = (index) => {
    const step = trajectory.steps[index];
    tokens.replaceChildren(...step.tokens.map((_, place) => tokenBox(trajectory, index, place)));
    const text = make("span", { class: "mono guess-text" }, step.text ?? (step.guess ?? []).join(" "));
    const score = step.score == null ? null : make("small", {}, `score ${shortScore(step.score)}`);
    guess.replaceChildren(make("dt", {}, `guess at step ${index + 1}`), make("dd", {}, mark(step.correct), text, score),
      ...(trajectory.reference == null ? [] : [make("dt", {}, "a solution"), make("dd", { class: "mono reference" }, trajectory.reference)]));
  };
  return { nodes: [tokens, guess], draw };
}

let panels = [];

function drawPanels() {
  const shown = byId("compare").checked ? view.panels : view.panels.slice(0, 1);
  panels = shown.map((choice, index) => panel(choice, "AB"[index]));
  byId("panels").replaceChildren(...panels.map((one) => one.node));
  const first = data.trajectories.find((one) => one.problem === view.problem);
  byId("question").replaceChildren(make("span", { class: "mono" }, first.prompt ?? ""), " ", make("small", {}, first.problem));
  byId("step").max = Math.max(...panels.map((one) => one.length));
  goTo(Number(byId("step").value));
}

function goTo(step) {
  const slider = byId("step");
  slider.value = step;
  const text = `step ${slider.value} of ${slider.max}`;
  const states = panels.map((one) => one.draw(Number(slider.value))).filter(Boolean);
  byId("step-text").textContent = text;
  slider.setAttribute("aria-valuetext", [text, ...states].join(", "));
}

function play(on = view.timer == null) {
  const slider = byId("step");
  clearInterval(view.timer);
  view.timer = null;
  byId("play").textContent = on ? "Pause" : "Play";
  if (!on) return;
  if (slider.value === slider.max) goTo(1);
  const pace = Math.max(120, Math.min(800, 12000 / Number(slider.max)));
  view.timer = setInterval(() => {
    goTo(Number(slider.value) + 1);
    if (slider.value === slider.max) play(false);
  }, pace);
}

function onKey(event) {
  const slider = byId("step");
  const inside = event.target === document.body || byId("viewer").contains(event.target);
  if (!inside || event.target.tagName === "SELECT" || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === " " && event.target === slider) play();
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") goTo(Number(slider.value) + (event.key === "ArrowLeft" ? -1 : 1));
  else return;
  event.preventDefault();
}

function drawTrajectories() {
  const all = data.trajectories;
  if (!all.length) {
    byId("viewer").replaceChildren(make("p", { class: "empty" }, "This run has no trajectories.jsonl."));
    return;
  }
  const [updates, decoders, problems] = ["step", "decoder", "problem"].map((key) => unique(all.map((one) => one[key])));
  view.panels = [{ update: updates[0], decoder: decoders[0] }, { update: updates.at(-1), decoder: decoders.at(-1) }];
  const ends = (problem) => view.panels.map(({ update, decoder }) => find(problem, update, decoder)).map((one) => (one ? outcome(one) : {}));
  const telling = (problem) => {
    const [base, tuned] = ends(problem);
    return (base.over ? 2 : 0) + (tuned.final ? 1 : 0);
  };
  view.problem = problems.reduce((best, problem) => (telling(problem) > telling(best) ? problem : best));
  const title = (problem) => {
    const over = all.some((one) => one.problem === problem && outcome(one).over);
    return `${String(all.find((one) => one.problem === problem).prompt ?? problem).slice(0, 70)}${over ? `  (${isImages ? "lost on the way" : "over-denoised"} at some update)` : ""}`;
  };
  fillSelect(byId("problem"), problems.map((problem) => [problem, title(problem)]), view.problem);
  byId("problem").addEventListener("change", (event) => {
    view.problem = event.target.value;
    drawPanels();
  });
  document.querySelectorAll(".of-tokens").forEach((node) => (node.hidden = isImages));
  document.querySelectorAll(".of-images").forEach((node) => (node.hidden = !isImages));
  byId("compare").checked = all.length > 1;
  byId("compare").addEventListener("change", drawPanels);
  byId("show-guesses").addEventListener("change", drawPanels);
  byId("step").addEventListener("input", (event) => goTo(Number(event.target.value)));
  byId("play").addEventListener("click", () => play());
  byId("back").addEventListener("click", () => goTo(Number(byId("step").value) - 1));
  byId("forward").addEventListener("click", () => goTo(Number(byId("step").value) + 1));
  document.addEventListener("keydown", onKey);
  drawings.push(() => {
    byId("ramp").style.background = rampImage();
    drawPanels();
  });
  if (isImages) Object.assign(byId("step"), { max: Math.max(...all.map((one) => one.steps.length)), value: 10 ** 6 }); // begin at the end
}

// Start

function drawAll() {
  drawings.forEach((draw) => draw());
}

drawHeader();
drawTable();
drawTrajectories();
drawGuesses();
drawAlongSteps();
drawWatched();
drawCurves();
if (isImages) drawImageGrid();
else drawSamples();
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
