// Questions as the page keeps them, and as records of System One's API. Nothing here knows an element.

export const KINDS = { noul: "Yes or no", choice: "Choice", score: "Score", x_span: "Passage" };
export const UNITS = ["sentence", "line", "paragraph"];

const MOST_QUESTIONS = 1024;
const MOST_ROWS = 10_000;

const text = (value) => (typeof value === "string" ? value : "");
const list = (value, most) => (Array.isArray(value) ? value.slice(0, most) : []);

let count = 0;

/** A question that is still empty. `key` is the page's own name for it: its id may change, and be that of another. */
export function blank(kind, id) {
  return { key: `q${++count}`, id, kind, instructions: "", yes: "", no: "", options: [{ name: "", text: "" }, { name: "", text: "" }], levels: ["", ""], unit: "sentence", parent: "", holds: "" };
}

/** Questions of a value that another version, or another program, may have written. */
export function checkedQuestions(value) {
  const checked = list(value, MOST_QUESTIONS).filter((one) => one && typeof one === "object" && Object.hasOwn(KINDS, one.kind)).map((one) => ({
    ...blank(one.kind, text(one.id)),
    was: text(one.key),
    ...Object.fromEntries(["instructions", "yes", "no", "parent", "holds"].map((name) => [name, text(one[name])])),
    options: list(one.options, MOST_ROWS).map((option) => ({ name: text(option?.name), text: text(option?.text) })),
    levels: list(one.levels, MOST_ROWS).map(text),
    unit: UNITS.includes(one.unit) ? one.unit : "sentence",
  }));
  const keys = new Map(checked.map((one) => [one.was, one.key]));
  for (const one of checked) {
    one.parent = keys.get(one.parent) ?? "";
    delete one.was;
  }
  for (const one of checked) if (above(one, checked).includes(one)) one.parent = "";
  return checked;
}

/** The questions that one depends on, the nearest first; a circle ends where it closes. */
export function above(question, all) {
  const chain = [];
  for (let at = question; at.parent;) {
    at = all.find((one) => one.key === at.parent);
    if (!at || chain.includes(at)) break;
    chain.push(at);
  }
  return chain;
}

/** The answers that a question can have, as [value, what to call it]. */
export function answersOf({ kind, options, levels }) {
  if (kind === "noul") return [["true", "yes"], ["false", "no"]];
  if (kind === "score") return levels.filter((level) => level.trim()).map((level, at) => [String(at), `${at}: ${level}`]);
  return kind === "choice" ? options.filter(({ name }) => name).map(({ name }) => [name, name]) : [];
}

/** What a question still lacks, in a sentence; "" for one that can be asked. */
export function lack(question, all) {
  const { id, kind, instructions, yes, no, options, levels, parent, holds } = question;
  if (!id) return "Give it an id.";
  if (all.find((one) => one.id === id) !== question) return `The id “${id}” is that of another question.`;
  const names = options.map(({ name }) => name).filter(Boolean);
  const twice = kind === "choice" && names.find((name, at) => names.indexOf(name) !== at);
  if (twice) return `The option “${twice}” stands there twice.`;
  if (kind === "choice" && !names.length) return "Name its options.";
  if (kind === "score" && !levels.some((level) => level.trim())) return "Describe its levels, the lowest first.";
  if (kind === "noul" && !instructions.trim() && !yes.trim() && !no.trim()) return "Write what is asked.";
  if (kind === "x_span" && !instructions.trim()) return "Say which passage is meant.";
  const condition = parent && all.find(({ key }) => key === parent);
  if (condition && lack(condition, all)) return `It depends on “${condition.id}”, which cannot be asked yet.`;
  if (condition && !answersOf(condition).some(([value]) => value === holds)) return `Choose the answer that “${condition.id}” must have.`;
  return "";
}

/** The record of a question, in pairs: a Map keeps the order even of names that are numbers. Without what it depends on. */
export function recordOf({ kind, instructions, yes, no, options, levels, unit }) {
  const record = new Map([["type", kind]]);
  if (instructions.trim()) record.set("instructions", instructions);
  const described = [["true", yes], ["false", no]].filter(([, meaning]) => meaning.trim());
  if (kind === "noul" && described.length) record.set("criteria", new Map(described));
  if (kind === "choice") record.set("criteria", new Map(options.filter(({ name }) => name).map(({ name, text: meaning }) => [name, meaning.trim() ? meaning : null])));
  if (kind === "score") record.set("criteria", levels.filter((level) => level.trim()));
  if (kind === "x_span") record.set("unit", unit);
  return record;
}

/** The condition of a question as System One's record of it: {id: answer}; null without one. */
export function conditionOf(question, all) {
  const condition = all.find(({ key }) => key === question.parent);
  return condition ? new Map([[condition.id, condition.kind === "noul" ? question.holds === "true" : question.holds]]) : null;
}

/** What the answer to a question follows from: not its id, and none of its neighbours. */
export const keyOf = (question, all) =>
  json([recordOf(question), ...above(question, all).slice(0, 1).map((condition) => [keyOf(condition, all), question.holds])]);

/** JSON, of Maps too; with an indent as Python writes it. */
export function json(value, indent = "", inner = "\n") {
  const [open, close, parts] = Array.isArray(value)
    ? ["[", "]", value.map((one) => json(one, indent, inner + indent))]
    : value instanceof Map
      ? ["{", "}", [...value].map(([name, one]) => `${JSON.stringify(name)}: ${json(one, indent, inner + indent)}`)]
      : ["", "", null];
  if (!parts) return value instanceof Raw ? value.text : value && typeof value === "object" ? json(new Map(Object.entries(value)), indent, inner) : JSON.stringify(value);
  if (!indent || !parts.length) return open + parts.join(", ") + close;
  return open + inner + indent + parts.join(`,${inner}${indent}`) + inner + close;
}

/** JSON that is written as it stands: a state's numbers and the order of its names stay what they are. */
export class Raw {
  constructor(source) {
    this.text = source.trim();
  }
}

// ---- requests of others ----------------------------------------------------------------------------------------------

/** JSON with records as Maps and numbers as they are written: JavaScript would sort names that are numbers, and round. */
export function ordered(source) {
  JSON.parse(source); // throws what is wrong, so that only JSON is read below
  const tokens = source.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g);
  let at = 0;
  const value = () => {
    const token = tokens[at++];
    if (token === "{" || token === "[") {
      const [close, parts] = token === "{" ? ["}", []] : ["]", []];
      while (tokens[at] !== close) {
        if (tokens[at] === ",") at++;
        const name = token === "{" ? JSON.parse(tokens[at++]) : null;
        if (token === "{") at++; // the colon
        parts.push(token === "{" ? [name, value()] : value());
      }
      at++;
      return token === "{" ? new Map(parts) : parts;
    }
    return /^[-0-9]/.test(token) ? new Raw(token) : JSON.parse(token);
  };
  return value();
}

const plain = (content) => (content === null || content === undefined ? "" : typeof content === "string" ? content : json(content));
const pairs = (value) => (value instanceof Map ? [...value] : []);

function questionOf(id, record) {
  const [type, instructions, criteria, unit] = ["type", "instructions", "criteria", "unit"].map((name) => new Map(pairs(record)).get(name));
  if (!Object.hasOwn(KINDS, type)) throw new Error(`The question “${id}” is of no kind that this page knows; it knows ${Object.keys(KINDS).join(", ")}.`);
  const meaning = new Map(pairs(criteria));
  return {
    ...blank(type, id),
    instructions: plain(instructions),
    ...(type === "noul" ? { yes: plain(meaning.get("true")), no: plain(meaning.get("false")) } : {}),
    ...(type === "choice" ? { options: pairs(criteria).slice(0, MOST_ROWS).map(([name, one]) => ({ name, text: plain(one) })) } : {}),
    ...(type === "score" ? { levels: list(criteria, MOST_ROWS).map(plain) } : {}),
    ...(UNITS.includes(unit) ? { unit } : {}),
  };
}

const STANDARD = { samples: "1", steps: "1", think: "never", threshold: "0.5", seed: "0", calibrated: true };

/** The state, the questions and the settings of a request of System One's; null for JSON that is none, throws for a broken one. */
export function fromRequest(source) {
  const request = ordered(source);
  if (!(request instanceof Map) || !request.has("state") || !(request.get("questions") instanceof Map)) return null;
  const records = pairs(request.get("questions")).slice(0, MOST_QUESTIONS);
  const questions = records.map(([id, record]) => questionOf(id, record));
  records.forEach(([, record], at) => {
    const [[id, holds] = []] = pairs(record.get("x_depends_on"));
    const parent = questions.find((one) => one.id === id);
    if (parent) Object.assign(questions[at], { parent: parent.key, holds: plain(holds) });
  });
  for (const one of questions) if (above(one, questions).includes(one)) one.parent = "";
  const state = request.get("state");
  const isJson = typeof state !== "string";
  const set = Object.keys(STANDARD).filter((name) => request.has(`x_${name}`)).map((name) => [name, request.get(`x_${name}`)]);
  const values = { ...STANDARD, ...Object.fromEntries(set.map(([name, value]) => [name, typeof value === "boolean" ? value : plain(value)])) };
  return { state: isJson ? json(state, "  ") : state, isJson, questions, values };
}
