// The answer to a question: what is likeliest, and a bar for the probability of each option.

import { ApiError } from "./api.js";
import { el } from "./dom.js";
import { answersOf } from "./questions.js";

const IN_ORDER = 8; // options that keep their order; of more the likeliest come first
const SHOWN = 300; // bars at most

const isShare = (value) => typeof value === "number" && value >= 0 && value <= 1.000001;

/** A share as people read it: 98.2 %, < 0.1 %. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${share < 0.9995 && share > 0.999 ? "> 99.9" : (100 * share).toFixed(share === 0 || share >= 0.9995 ? 0 : 1)} %`;
}

/** A server's answer: {top, shares: [[option, share]], confidence, level, place, thought}. Throws for one that is none. */
export function readAnswer(answer, question) {
  const broken = new ApiError("broken", `The answer to “${question.id}” is none to a question of this kind.`);
  if (!answer || answer.type !== question.kind) throw broken;
  const thought = typeof answer.x_thought === "string" ? answer.x_thought : "";
  const confidence = answer.confidence ?? answer.x_confidence ?? null;
  if (confidence !== null && !isShare(confidence)) throw broken;
  if (question.kind === "noul") {
    if (!isShare(answer.noul)) throw broken;
    const shares = [["true", answer.noul], ["false", 1 - answer.noul]];
    return { top: answer.noul >= 0.5 ? "true" : "false", shares, confidence, thought };
  }
  const shares = Object.entries(answer.probabilities ?? {});
  if (!shares.length || !shares.every(([, share]) => isShare(share))) throw broken;
  if (question.kind === "score" && !(answer.score >= 0 && answer.score <= shares.length - 0.99)) throw broken;
  const likeliest = shares.reduce((best, one) => (one[1] > best[1] ? one : best))[0];
  const top = { choice: answer.choice, x_span: answer.passage, score: likeliest }[question.kind];
  if (!Object.hasOwn(answer.probabilities, top)) throw broken;
  const { start, end } = answer;
  const place = Number.isInteger(start) && Number.isInteger(end) ? [start, end] : null;
  return { top, shares, confidence, level: answer.score, place, thought };
}

/** The answer's place under its question. `choose(passage)` is called for a passage that is chosen. */
export class Bars {
  constructor(choose) {
    this.choose = choose;
    this.rows = new Map();
    this.line = el("p", { class: "ruling" });
    this.scale = el("div", { class: "level", hidden: true, "aria-hidden": "true" }, el("span", { class: "pin" }));
    this.list = el("ul", { class: "bars" });
    this.thought = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thought"), el("div", { class: "plain", dir: "auto" }));
    this.root = el("div", { class: "reading", hidden: true }, this.line, this.scale, this.list, this.thought);
  }

  /** What was answered no longer belongs to what is asked. */
  set isStale(value) {
    this.root.classList.toggle("stale", value);
  }

  /** As if nothing had been answered. */
  clear() {
    this.root.hidden = true;
    this.rows.clear();
  }

  say(words) {
    this.line.replaceChildren(words);
    this.list.replaceChildren();
    this.rows.clear();
    this.scale.hidden = true;
    this.thought.hidden = true;
    this.root.hidden = false;
    this.isStale = false;
  }

  show(reading, question) {
    const levels = new Map(question.kind === "score" ? answersOf(question) : []);
    const name = (option) => {
      if (question.kind === "noul") return option === "true" ? "Yes" : "No";
      return levels.get(option) ?? option;
    };
    this.root.hidden = false;
    this.isStale = false;
    const share = new Map(reading.shares).get(reading.top) ?? 0;
    const sure = reading.confidence === null ? "" : `confidence ${reading.confidence.toFixed(2)}`;
    const top = el(question.kind === "x_span" ? "q" : "strong", { dir: "auto" }, name(reading.top));
    const level = reading.level === undefined ? "" : `expected ${reading.level.toFixed(2)} of ${reading.shares.length - 1}`;
    this.line.replaceChildren(top, " ", el("span", {}, [percent(share), level, sure].filter(Boolean).join(", ")));
    this.scale.hidden = reading.level === undefined;
    if (reading.level !== undefined) this.scale.firstChild.style.insetInlineStart = `${(100 * reading.level) / Math.max(1, reading.shares.length - 1)}%`;
    this.thought.hidden = !reading.thought;
    this.thought.lastChild.textContent = reading.thought;
    this.draw(reading, question, name);
  }

  draw({ shares, top }, question, name) {
    const names = question.kind === "choice" ? question.options.map((option) => option.name) : [];
    const places = new Map(names.map((option, at) => [option, at]));
    const isSorted = shares.length > IN_ORDER || question.kind === "x_span";
    const order = isSorted ? [...shares].sort((a, b) => b[1] - a[1]) : [...shares].sort((a, b) => (places.get(a[0]) ?? 0) - (places.get(b[0]) ?? 0));
    const shown = order.slice(0, SHOWN);
    const rows = new Map();
    for (const [option, share] of shown) {
      const row = this.rows.get(option) ?? this.row(option, question);
      row.label.textContent = name(option);
      row.root.title = name(option); // what is too long for its column
      row.share.textContent = percent(share);
      row.bar.style.inlineSize = `${100 * share}%`;
      row.root.classList.toggle("likeliest", option === top);
      rows.set(option, row);
    }
    this.rows = rows;
    const left = order.length - shown.length;
    this.list.replaceChildren(...[...rows.values()].map(({ root }) => root), ...(left ? [el("li", { class: "hint" }, `… ${left} more`)] : []));
    const isLong = order.length > IN_ORDER;
    this.list.classList.toggle("long", isLong);
    if (isLong) this.list.setAttribute("tabindex", "0"); // what scrolls must be reachable
    else this.list.removeAttribute("tabindex");
    this.list.setAttribute("aria-label", `Probabilities of ${order.length} answers${isSorted ? ", the likeliest first" : ""}`);
  }

  row(option, question) {
    const label = question.kind === "x_span"
      ? el("button", { class: "quiet", type: "button", onclick: () => this.choose(option) })
      : el("span", { class: "name", dir: "auto" });
    const bar = el("span", { class: "bar" });
    const share = el("span", { class: "share" });
    return { label, bar, share, root: el("li", {}, label, el("span", { class: "track", "aria-hidden": "true" }, bar), share) };
  }
}
