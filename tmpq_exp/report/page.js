"use strict";
// Marks of the charts: pointing at one shows its figures, clicking it (or Enter) its bits per layer and its timesteps.
(() => {
  const data = JSON.parse(document.getElementById("candidates").textContent);
  const panel = document.getElementById("candidate");
  const tip = document.getElementById("tip");
  const REACH = 22; // how far from a mark, in pixels of the screen, a pointer still means it
  const NEAR = 8; // how far, where it is on a line

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const digits = (row) => Array.from(row, (digit) => parseInt(digit, 36));

  function cell(candidate, step, layer, kind, bits) {
    const shade = data.palette[bits];
    const made = element("span", "cell", shade.text);
    made.style.background = shade.fill;
    made.style.color = shade.ink;
    const plain = { W: "weights", A: "activations" }[kind];
    const what = data.weighted[layer] ? plain : { W: "softmax output", A: "q, k and v" }[kind];
    const tile = candidate.tiles.length ? parseInt(candidate.tiles[step][layer], 36) : 0;
    made.title = `${data.layers[layer]}: ${what} ${bits === 32 ? "float" : bits + " bits"}` + (tile ? `, F(${tile}, r)` : "");
    return made;
  }

  function heatMap(candidate) {
    const shared = candidate.w.length === 1;
    const heat = element("div", "heat" + (shared ? "" : " perstep"));
    for (const [block, indices] of data.blocks) {
      const figure = element("figure");
      figure.append(element("figcaption", "", block));
      for (const [kind, rows] of [["W", candidate.w], ["A", candidate.a]]) {
        rows.forEach((text, step) => {
          const bits = digits(text);
          const row = element("div", "row");
          row.append(element("span", "", shared ? kind : `${kind} t=${candidate.timesteps[step]}`));
          for (const layer of indices) row.append(cell(candidate, step, layer, kind, bits[layer]));
          figure.append(row);
        });
      }
      heat.append(figure);
    }
    return heat;
  }

  function schedule(candidate) {
    const track = element("div", "track first");
    track.title = candidate.timesteps.join(", ");
    for (const t of candidate.timesteps) {
      const mark = element("i");
      mark.style.left = `${100 * (1 - t / data.last)}%`;
      mark.title = `t = ${t}`;
      track.append(mark);
    }
    const ends = element("div", "ends");
    ends.append(element("span", "", `noise, t = ${data.last}`), element("span", "", "image, t = 0"));
    const both = element("div", "shown-schedule");
    both.append(track, ends);
    return both;
  }

  function select(trial) {
    const candidate = data.candidates[trial];
    if (!candidate) return;
    const best = String(data.best) === String(trial);
    const parts = [
      element("h3", "", candidate.name + (best ? " (best found)" : "")),
      element("p", "note", candidate.figures.join(", ")),
    ];
    if (candidate.w.length) parts.push(heatMap(candidate));
    parts.push(schedule(candidate));
    panel.replaceChildren(...parts);
    panel.dataset.trial = trial;
    panel.hidden = false;
    for (const mark of document.querySelectorAll("[data-trial]")) {
      if (mark !== panel) mark.classList.toggle("selected", mark.dataset.trial === String(trial));
    }
  }

  function meant(svg, event) {
    // The nearest mark, not the one drawn on top: marks of equal candidates lie over one another.
    const line = event.target.closest("[data-trial]:not([data-x])");
    const matrix = svg.getScreenCTM();
    if (!matrix) return null;
    let nearest = null;
    let least = line ? NEAR : REACH;
    for (const mark of svg.querySelectorAll("[data-x]")) {
      const x = mark.dataset.x * matrix.a + matrix.e - event.clientX;
      const y = mark.dataset.y * matrix.d + matrix.f - event.clientY;
      const distance = Math.hypot(x, y);
      if (distance < least) [nearest, least] = [mark, distance];
    }
    return nearest || line;
  }

  function show(mark, x, y) {
    const candidate = mark && data.candidates[mark.dataset.trial];
    tip.hidden = !candidate;
    if (!candidate) return;
    tip.textContent = `${candidate.name}: ${candidate.figures.join(", ")}`;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, document.documentElement.clientWidth - width - 4))}px`;
    tip.style.top = `${y + 18 + height > window.innerHeight ? y - height - 10 : y + 18}px`;
  }

  for (const svg of document.querySelectorAll("svg")) {
    const marks = svg.querySelectorAll("[data-trial]");
    if (!marks.length) continue;
    svg.classList.add("live");
    for (const mark of marks) {
      const title = mark.querySelector("title"); // the browser's own bubble would lie over ours
      if (title) {
        mark.setAttribute("aria-label", title.textContent);
        title.remove();
      }
    }
    let pointed = null; // a click means what was shown when it began: its own coordinates are rounded
    for (const kind of ["pointermove", "pointerdown"]) {
      svg.addEventListener(kind, (event) => {
        pointed = meant(svg, event);
        show(pointed, event.clientX, event.clientY);
      });
    }
    svg.addEventListener("pointerleave", () => show(null));
    svg.addEventListener("click", () => pointed && select(pointed.dataset.trial));
    svg.addEventListener("focusin", (event) => {
      const mark = event.target.closest("[data-trial]");
      if (!mark || !mark.matches(":focus-visible")) return;
      const { right, bottom } = mark.getBoundingClientRect();
      show(mark, right, bottom);
    });
    svg.addEventListener("focusout", () => show(null));
    svg.addEventListener("keydown", (event) => {
      const mark = event.target.closest("[data-trial]");
      if (!mark || (event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      select(mark.dataset.trial);
    });
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && show(null));
  for (const hint of document.querySelectorAll(".needs-script")) hint.hidden = false;
  if (data.best !== null) select(data.best);
})();
