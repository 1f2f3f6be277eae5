// Drawing drafts: tokens coloured by how sure the model is of them, and the gauge beside them, which replays the steps.

import { el, svg } from "./dom.js";
import { load, save } from "./store.js";

const LEVELS = [0.005, 0.05, 0.2, 0.6, 1.2, 2.4];

/** From 0, certain, to 6, undecided, for an entropy in nats; the same steps as on the terminal. */
export const level = (entropy) => LEVELS.filter((limit) => entropy >= limit).length;

/** Fill `box` with the tokens of a draft. Nodes are used again, as most tokens stay from step to step. */
export function drawPieces(box, frame) {
  frame.pieces.forEach((piece, at) => {
    const place = box.children[at] ?? box.appendChild(el("span", {}, "", el("span")));
    const [gap, node] = place.childNodes;
    const word = piece.trimStart(); // a token often begins with a space, which is not to be underlined
    const space = piece.slice(0, piece.length - word.length);
    if (gap.data !== space) gap.data = space;
    if (node.textContent !== word) node.textContent = word;
    let look = `t l${level(frame.entropies[at])}`;
    if (frame.accepted[at]) look += " accepted";
    if (at >= frame.end) look += " beyond";
    if (node.className !== look) node.className = look;
  });
  while (box.children.length > frame.pieces.length) box.lastElementChild.remove();
}

const mean = (numbers) => (numbers.length ? numbers.reduce((sum, number) => sum + number, 0) / numbers.length : 0);
const rounded = (number, digits) => (Number.isFinite(number) ? number.toFixed(digits) : "–");

/** Drafts of one answer: curve, figures, and the slider. `show(frame)` draws a step; `show(null)` what came of it. */
export class Gauge {
  constructor(show) {
    this.show = show;
    this.frames = [];
    this.isOver = false;
    this.timer = null;
    this.line = svg("path", { class: "curve" });
    this.area = svg("path", { class: "under" });
    this.seams = svg("path", { class: "seam" });
    this.here = svg("path", { class: "here" });
    const chart = svg("svg", { class: "chart", viewBox: "0 0 200 56", preserveAspectRatio: "none", "aria-hidden": "true" });
    chart.append(this.area, this.seams, this.line, this.here);
    this.slider = el("input", { type: "range", class: "replay", min: 0, max: 0, step: 1, value: 0, "aria-label": "Replay the steps" });
    this.slider.addEventListener("input", () => {
      this.pause();
      this.#look();
    });
    const playOrPause = () => (this.timer ? this.pause() : this.#start());
    this.play = el("button", { class: "quiet play", type: "button", onclick: playOrPause }, "Play");
    this.where = el("p", { class: "where" });
    this.facts = el("dl", { class: "facts" });
    this.stage = el("div", { class: "stage", hidden: true },
      el("p", { class: "caption" }, "Entropy, nats a token"), chart,
      el("div", { class: "row scrub" }, this.slider, this.play), this.where,
      el("p", { class: "legend", "aria-hidden": "true" }, el("span", {}, "certain"), el("span", { class: "scale" }), el("span", {}, "undecided")));
    this.short = el("span", { class: "short" });
    this.root = el("details", { class: "gauge", open: load("gauge", true) }, el("summary", {}, "Steps", this.short), this.facts, this.stage);
    this.root.addEventListener("toggle", () => save("gauge", this.root.open));
  }

  /** A step's draft. `before`: what had been committed when it came. */
  add(draft, before = 0) {
    const isFollowing = this.isAtEnd();
    this.frames.push({ ...draft, before, mean: mean(draft.entropies) });
    this.stage.hidden = false;
    this.#draw();
    this.slider.max = this.frames.length - 1;
    if (isFollowing) this.slider.value = this.slider.max;
    this.#look(!isFollowing);
    if (!this.isOver) this.#live();
  }

  /** The answer is there (or broke off): the slider's last place shows it. */
  finish(usage = null) {
    const isFollowing = this.isAtEnd();
    this.isOver = true;
    if (this.frames.length) {
      this.slider.max = this.frames.length;
      if (isFollowing) this.slider.value = this.slider.max;
      this.#look();
    }
    if (usage) this.figures(usage);
  }

  figures(usage) {
    const { steps } = usage;
    this.short.textContent = steps ? `: ${steps}, ${rounded(usage.tokens_per_pass, 1)} tokens each` : "";
    this.#facts([
      ["Tokens", usage.completion_tokens ?? usage.tokens],
      ["Canvases", usage.canvases],
      ["Steps", usage.steps],
      ["Tokens per pass", rounded(usage.tokens_per_pass, 1)],
      ["Seconds", rounded(usage.seconds, usage.seconds < 10 ? 2 : 0)],
    ]);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  #start() {
    if (this.isAtEnd()) this.slider.value = 0;
    this.#look();
    this.play.textContent = "Pause";
    this.timer = setInterval(() => {
      this.slider.value = Number(this.slider.value) + 1;
      this.#look();
      if (this.isAtEnd() || !this.root.isConnected) this.pause();
    }, 220);
  }

  isAtEnd() {
    return Number(this.slider.value) >= Number(this.slider.max);
  }

  #look(isQuiet = false) {
    const at = Number(this.slider.value);
    const frame = this.frames[at] ?? null;
    const words = frame ? `Canvas ${frame.canvas + 1}, step ${frame.step}, ${rounded(frame.mean, 2)} nats` : "The answer";
    this.where.textContent = words;
    this.slider.setAttribute("aria-valuetext", words);
    const x = this.#x(Math.min(at, this.frames.length - 1));
    this.here.setAttribute("d", `M${x} 0V56`);
    if (!isQuiet) this.show(frame);
  }

  #x(at) {
    return this.frames.length > 1 ? ((at / (this.frames.length - 1)) * 196 + 2).toFixed(1) : 2;
  }

  #draw() {
    const top = Math.max(0.1, ...this.frames.map((frame) => frame.mean));
    const points = this.frames.map((frame, at) => `${this.#x(at)} ${(53 - (frame.mean / top) * 49).toFixed(1)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M2 56L${points.join("L")}L${this.#x(this.frames.length - 1)} 56Z`);
    const seams = this.frames.flatMap((frame, at) => (at && frame.canvas !== this.frames[at - 1].canvas ? [`M${this.#x(at - 0.5)} 0V56`] : []));
    this.seams.setAttribute("d", seams.join(""));
  }

  #live() {
    const last = this.frames.at(-1);
    // So far: earlier canvases are committed up to their ends, of this one only what is accepted counts.
    const ends = new Map(this.frames.map((frame) => [frame.canvas, frame.end]));
    ends.set(last.canvas, last.accepted.slice(0, last.end).filter(Boolean).length);
    const tokens = [...ends.values()].reduce((sum, end) => sum + end, 0);
    this.#facts([
      ["Canvas", last.canvas + 1],
      ["Step", last.step],
      ["Accepted", `${last.accepted.filter(Boolean).length} of ${last.accepted.length}`],
      ["Tokens per pass", `≈ ${rounded(tokens / this.frames.length, 1)}`],
    ]);
  }

  #facts(pairs) {
    const known = pairs.filter(([, value]) => value !== undefined && value !== null);
    this.facts.replaceChildren(...known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
  }
}
