// What the page shows of runs on images: chains as pictures, a grid of samples over training, what is not optimised.
// page.py joins this file between charts.js and app.js; the helpers and `data` come from app.js.

/** A picture of a run. Small ones are enlarged pixel by pixel, not smoothed. */
function picture(source, text, attributes = {}) {
  const node = make("img", { src: source, alt: text, title: text, ...attributes });
  node.addEventListener("load", () => node.classList.toggle("smooth", node.naturalWidth > 96));
  return node;
}

const judged = (record) => (record.correct == null ? "not judged" : record.correct ? "right" : "wrong");

/** The chain of a trajectory: the state after a step beside the x0 that was expected at it, and all steps as a film. */
function pictures(trajectory, label) {
  const frame = (kind, text) => {
    const node = make("figure", { class: "frame" });
    return { kind, text, node };
  };
  const frames = [frame("image", "state"), frame("guess_image", "expected image")].filter(({ kind }) => trajectory.steps[0][kind]);
  const film = make("div", { class: "film", "aria-label": `all steps of ${label}` }, ...trajectory.steps.map((step, index) => {
    const text = `step ${index + 1}`;
    return make("button", { type: "button", "aria-label": `${text} of ${label}`, click: () => goTo(index + 1) },
      ...frames.map(({ kind }) => picture(step[kind], "", { "aria-hidden": "true" })),
      make("small", {}, String(index + 1)));
  }));
  const said = make("p", { class: "hint" });
  const draw = (index) => {
    const step = trajectory.steps[index];
    for (const { kind, text, node } of frames)
      node.replaceChildren(picture(step[kind], `${text} of ${label} at step ${index + 1}`), make("figcaption", {},
        kind === "image" ? `state after step ${index + 1}` : `x₀ expected at step ${index + 1}`));
    const time = step.time == null ? "" : `time ${number(step.time)} (1 noise, 0 image)`;
    said.textContent = [time, step.noisy == null ? "" : step.noisy ? "drawn with noise" : "without noise"].filter(Boolean).join(", ");
    [...film.children].forEach((node, place) => node.classList.toggle("now", place === index));
  };
  return { nodes: [make("div", { class: "frames" }, ...frames.map(({ node }) => node)), said, film], draw };
}

/** Rows are problems, columns are updates: how the same noise turns into images as training goes on. */
function drawImageGrid() {
  const body = byId("sample-body");
  byId("denoising").before(byId("samples")); // what a person wants to see first
  byId("denoising-link").before(byId("samples-link"), " ");
  byId("samples").querySelector(".intro").textContent =
    "The same held-out prompts, from the same noise, over training. A green edge: the judge takes it for what was asked; a dashed orange one: it does not.";
  const decoders = unique(data.samples.map((sample) => sample.decoder ?? "default"));
  const all = unique(data.samples.map((sample) => sample.step));
  const columns = Math.min(12, all.length);
  const updates = unique(Array.from({ length: columns }, (_, i) => all[Math.round((i * (all.length - 1)) / Math.max(1, columns - 1))]));
  const decoder = fillSelect(make("select", { id: "grid-decoder", change: () => draw() }), decoders.map((name) => [name, name]), decoders[0]);
  const table = make("table", { class: "grid" });
  body.append(make("div", { class: "controls", hidden: decoders.length < 2 }, make("label", {}, "Decoder", decoder)),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Samples over training" }, table));
  function draw() {
    const own = data.samples.filter((sample) => (sample.decoder ?? "default") === decoder.value);
    const at = new Map(own.map((sample) => [`${sample.step} ${sample.problem}`, sample]));
    const right = (step) => {
      const found = own.filter((sample) => sample.step === step);
      return `${found.filter((sample) => sample.correct).length} of ${found.length}`;
    };
    const cell = (step, problem) => {
      const sample = at.get(`${step} ${problem}`);
      if (!sample?.image) return make("td", {}, "–");
      const text = `${sample.prompt}, update ${step}: ${judged(sample)}${sample.score == null ? "" : `, score ${shortScore(sample.score)}`}`;
      return make("td", {}, picture(sample.image, text, { class: sample.correct ? "yes" : "no" }));
    };
    const problems = unique(own.map((sample) => sample.problem));
    const prompt = (problem) => String(own.find((sample) => sample.problem === problem).prompt ?? problem);
    table.replaceChildren(
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "prompt"),
        ...updates.map((step) => make("th", { scope: "col" }, step === 0 ? "base" : number(step), make("small", {}, right(step)))))),
      make("tbody", {}, ...problems.map((problem) => make("tr", {}, make("th", { scope: "row", title: problem, class: "mono" }, prompt(problem)),
        ...updates.map((step) => cell(step, problem))))));
  }
  draw();
}

/** Held-out measures that nothing is trained on, each with the direction in which it should not go. */
function drawWatched() {
  const keys = unique(Object.values(data.evals).flatMap(Object.keys)).filter((key) => key.startsWith("measure/") || key.startsWith("reward"));
  const watched = byId("watched");
  watched.hidden = byId("watched-link").hidden = !keys.length;
  const directions = { "measure/distance": "to the nearest real image; rises when samples leave the data",
    "measure/frechet": "to the real data; rises when samples leave the data",
    "measure/diversity": "among samples of one prompt; falls when they become alike" };
  for (const warning of data.drift) byId("drift").append(make("p", { class: "warning", role: "status" }, warning));
  for (const key of keys) {
    const title = key === "reward" ? "Optimised reward" : key.replace(/^(measure|reward)\//, "");
    figure(byId("watched-charts"), { title: title[0].toUpperCase() + title.slice(1), note: directions[key] ?? (key === "reward" ? "on held-out prompts" : "part of the reward, held-out") },
      () => heldOut(key));
  }
}

/** What a gradient step measured at every denoising step: the first against the last updates. */
function drawAlongSteps() {
  const names = Object.keys(data.steps);
  byId("along").hidden = byId("along-link").hidden = !names.length;
  const titles = { ratio_mean: "Importance ratio", ratio_deviation: "Distance of the ratio from 1", clip_low: "Clipped below", clip_high: "Clipped above", clipped_good: "Good samples that are clipped", clipped_bad: "Bad samples that are clipped", log_ratio_mean: "Mean log-ratio", log_ratio_std: "Deviation of the log-ratio", log_prob: "Log-probability" };
  for (const name of names) {
    const { from, to, values } = data.steps[name];
    const part = Math.max(1, Math.floor(values.length / 8));
    const mean = (start) => values[0].map((_, step) => {
      const known = values.slice(start, start + part).map((column) => column[step]).filter((value) => value != null);
      return known.length ? known.reduce((a, b) => a + b) / known.length : null;
    });
    const span = (first, last) => (from[first] === to[last] ? `update ${from[first]}` : `updates ${from[first]}–${to[last]}`);
    const x = values[0].map((_, step) => step + 1);
    figure(byId("along-charts"), { title: titles[name] ?? name, note: "1 is the noisiest step", x: "denoising step", percent: name.startsWith("clip") }, () => [
      { x, y: mean(0), label: span(0, part - 1), colour: "c0", dots: true, dash: [7, 4] },
      ...(values.length > 1 ? [{ x, y: mean(values.length - part), label: span(values.length - part, values.length - 1), colour: "c1", dots: true }] : []),
    ]);
  }
}
