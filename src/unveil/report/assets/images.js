// What the page shows of runs on images: chains as pictures, a grid of samples over training, what is not optimised.
// page.py joins this file between charts.js and app.js; the helpers and `data` come from app.js.

/** A picture of a run. Small ones are enlarged pixel by pixel, not smoothed. */
function picture(source, text, attributes = {}) {
  const node = make("img", { src: source, alt: text, title: text, ...attributes });
  node.addEventListener("load", () => node.classList.toggle("smooth", node.naturalWidth > 96));
  return node;
}

/** A picture as a button that opens it in full size, with what there is to say of it. */
function enlarging(image, text) {
  const open = () => {
    const copy = picture(image.src, image.alt);
    copy.addEventListener("load", () => (copy.style.width = `min(86vw, 70vh, ${Math.max(360, copy.naturalWidth)}px)`));
    byId("large").replaceChildren(copy, make("p", {}, text), make("button", { type: "button", click: () => byId("large").close() }, "Close"));
    byId("large").showModal();
  };
  return make("button", { type: "button", class: "enlarge", "aria-label": `enlarge: ${image.alt}`, click: open }, image);
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
      make("small", {}, String(index + 1)), ...(step.time == null ? [] : [make("small", {}, step.time.toFixed(2))]));
  }));
  const names = [...frames.map(({ kind }) => (kind === "image" ? "state" : "x₀")), "step", ...(trajectory.steps[0].time == null ? [] : ["time"])];
  const strip = make("div", { class: "filmstrip" }, make("div", { class: "names", "aria-hidden": "true" }, ...names.map((name) => make("span", {}, name))), film);
  const said = make("p", { class: "hint" });
  const draw = (index) => {
    const step = trajectory.steps[index];
    for (const { kind, text, node } of frames) {
      const caption = kind === "image" ? `state after step ${index + 1}` : `x₀ expected at step ${index + 1}`;
      node.replaceChildren(enlarging(picture(step[kind], `${text} of ${label} at step ${index + 1}`), `${trajectory.prompt ?? ""}: ${caption}`),
        make("figcaption", {}, caption));
    }
    const time = step.time == null ? "" : `time ${number(step.time)} (1 noise, 0 image)`;
    said.textContent = [time, step.noisy == null ? "" : step.noisy ? "drawn with noise" : "without noise"].filter(Boolean).join(", ");
    [...film.children].forEach((node, place) => node.classList.toggle("now", place === index));
    const cell = film.children[index];
    film.scrollLeft = cell.offsetLeft - film.offsetLeft - (film.clientWidth - cell.clientWidth) / 2;
  };
  return { nodes: [make("div", { class: "frames" }, ...frames.map(({ node }) => node)), said, strip], draw };
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
      return make("td", {}, enlarging(picture(sample.image, text, { class: sample.correct ? "yes" : "no" }), text));
    };
    const problems = unique(own.map((sample) => sample.problem));
    table.classList.toggle("long", own.some((sample) => String(sample.prompt ?? "").length > 12));
    const prompt = (problem) => String(own.find((sample) => sample.problem === problem).prompt ?? problem);
    table.replaceChildren(
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "prompt"),
        ...updates.map((step) => make("th", { scope: "col" }, step === 0 ? "base" : number(step), make("small", {}, right(step)))))),
      make("tbody", {}, ...problems.map((problem) => make("tr", {}, make("th", { scope: "row", title: `${prompt(problem)} (${problem})` }, make("span", {}, prompt(problem))),
        ...updates.map((step) => cell(step, problem))))));
  }
  draw();
}

/** What is optimised against what is not: both in one chart, and one chart for each number that is watched. */
function drawWatched() {
  const keys = unique(Object.values(data.evals).flatMap(Object.keys)).filter((key) => key === "latent_scale" || /^(measure|reward)\//.test(key));
  // A reward that is the task's own verdict has no held-out numbers of its own: accuracy, above, says it all.
  const known = Object.values(data.evals).some((curve) => curve.reward) || (data.train.reward && (keys.length || data.hacking.length));
  byId("watched").hidden = byId("watched-link").hidden = !keys.length && !known;
  byId("limits").textContent = Object.entries(data.limits).map(([key, limit]) => `${key.replace("measure/", "")} ${limit > 0 ? "up" : "down"} by ${percent(Math.abs(limit), 0)}`).join(", ");
  for (const { sentence, others } of data.hacking)
    byId("hacking").append(make("div", { class: "warning" }, make("p", {}, sentence),
      ...(others.length ? [make("p", {}, `Also: ${others.join("; ")}.`)] : [])));
  if (known) drawAgainst();
  const directions = { "measure/distance": "to the nearest real image; rises when samples leave the data",
    "measure/frechet": "to the real data; rises when samples leave the data",
    "measure/diversity": "among samples of one prompt; falls when they become alike",
    latent_scale: "root mean square of finished latents; grows when training loses the data" };
  const roles = { optimise: "optimised", audit: "audit: not trained on", evaluate: "for evaluation alone" };
  const note = (key) => {
    const part = data.parts[key.replace("reward/", "")];
    if (!part) return directions[key] ?? (key.startsWith("reward/") ? "part of the reward" : null);
    return `${roles[part.role] ?? part.role}, weight ${number(part.weight)}${part.weight < 0 ? ": less is better" : ""}`;
  };
  const rank = (key) => (key.startsWith("reward/") ? 0 : key === "latent_scale" ? 2 : 1);
  for (const key of keys.sort((a, b) => rank(a) - rank(b))) {
    const title = key.replace(/^(measure|reward)\//, "").replaceAll("_", " ");
    figure(byId("watched-charts"), { title: title[0].toUpperCase() + title.slice(1), note: note(key) },
      () => [...inTraining(key, "training", "c0"), ...heldOut(key)]);
  }
}

/** The optimised reward and the judge's accuracy: on one axis where both lie in [0, 1], else on one each. */
function drawAgainst() {
  const decoders = Object.keys(data.evals);
  const flagged = data.hacking[0]?.decoder;
  const select = fillSelect(make("select", { "aria-label": "Decoder", change: () => draw() }), decoders.map((name) => [name, name]), flagged ?? decoders[0]);
  const all = [data.train.reward, ...decoders.map((name) => data.evals[name])].flatMap((curve) => (curve?.reward ?? curve?.y) ?? []).filter((y) => y != null);
  const apart = all.some((y) => y < 0 || y > 1);
  const marks = () => data.hacking.filter(({ decoder }) => decoder === select.value).map(({ since }) => ({ x: since, text: `turned since update ${since}` }));
  const lines = () => {
    const curve = data.evals[select.value];
    return [
      ...inTraining("reward", "optimised reward, rollouts", "c0"),
      ...(curve?.reward ? [{ x: curve.x, y: curve.reward, ...interval(curve, "reward"), label: "optimised reward, held-out", colour: "c2", dots: true }] : []),
      ...(curve?.accuracy ? [{ x: curve.x, y: curve.accuracy, ...interval(curve, "accuracy"), label: "judge's accuracy, held-out", colour: "c1", dots: true, right: true }] : []),
    ].map((line) => ({ ...line, right: apart && line.right }));
  };
  const { caption, draw } = figure(byId("against"), { title: "Optimised against judged", height: 290, marks,
    y: apart ? "optimised reward" : "reward, and share judged right", right: "share judged right" }, lines);
  if (decoders.length > 1) caption.append(select);
}

/** What a gradient step measured at every denoising step: the first against the last updates. */
function drawAlongSteps() {
  const order = ["old_deviation", "ratio_mean", "ratio_deviation", "clip_low", "clip_high", "clipped_bad", "clipped_good", "log_ratio_mean", "log_ratio_std", "log_prob"];
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  const names = Object.keys(data.steps).sort((a, b) => place(a) - place(b));
  byId("along").hidden = byId("along-link").hidden = !names.length;
  const titles = { old_deviation: "Distance from the old policy", ratio_mean: "Importance ratio", ratio_deviation: "Distance of the ratio from 1", clip_low: "Clipped below", clip_high: "Clipped above", clipped_good: "Good samples that are clipped", clipped_bad: "Bad samples that are clipped", log_ratio_mean: "Mean log-ratio", log_ratio_std: "Deviation of the log-ratio", log_prob: "Log-probability" };
  for (const name of names) {
    const { from, to, values } = data.steps[name];
    const part = Math.max(1, Math.floor(values.length / 8));
    const mean = (start) => values[0].map((_, step) => {
      const known = values.slice(start, start + part).map((column) => column[step]).filter((value) => value != null);
      return known.length ? known.reduce((a, b) => a + b) / known.length : null;
    });
    const span = (first, last) => (from[first] === to[last] ? `update ${from[first]}` : `updates ${from[first]}–${to[last]}`);
    const x = values[0].map((_, step) => step + 1);
    figure(byId("along-charts"), { title: titles[name] ?? name, note: name === "old_deviation" ? "mean square of v − v_old" : null, x: "denoising step", percent: name.startsWith("clip"),
      ...(name === "ratio_mean" ? { level: 1, digits: 6 } : {}) }, () => [
      { x, y: mean(0), label: span(0, part - 1), colour: "c0", dots: true, dash: [7, 4] },
      ...(values.length > 1 ? [{ x, y: mean(values.length - part), label: span(values.length - part, values.length - 1), colour: "c1", dots: true }] : []),
    ]);
  }
}
