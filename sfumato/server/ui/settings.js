// Settings: the server's options as a form, built from what it says of them; what differs from its default is sent.

import { get, isKeyRemembered, key, setKey } from "./api.js";
import { byId, el } from "./dom.js";
import { load, save } from "./store.js";
import { trouble } from "./trouble.js";
import { WORDS, nameOf } from "./words.js";

const words = (text) => text.trim().split(/\s+/);

const GROUPS = {
  "Length and chance": words("max_tokens min_tokens stop seed thinking"),
  "Care against speed": words("max_steps temperature early short"),
  "What an answer may be": words("schema regex grammar choices strict must_call"),
};

/** Options that speak of an answer as a whole; a template's own slots say these things. */
const OF_ANSWERS = new Set(words(`max_tokens min_tokens stop thinking mode schema regex grammar choices strict must_call
  logprobs top_logprobs verify finish`));

/** The page decides these itself. */
const OWN = new Set(["drafts"]);

/** What was kept of the options; only fetchOptions knows which of it the server takes. */
let values = load("options", {});
let models = [];

/** The options that differ from their defaults: [name, value]. */
export const changes = () => Object.entries(values).filter(([name]) => !OWN.has(name));

export function clear(name) {
  delete values[name];
  save("options", values);
  byId("options").replaceChildren(); // drawn anew when they are looked at
}

/** Another tab has changed them. */
export function reload() {
  values = load("options", {});
  byId("options").replaceChildren();
}

const of = (id, otherwise = "") => load(`settings.${id}`, otherwise);

export const system = () => of("system").trim();
export const showsDrafts = () => of("drafts", true);

export function tools() {
  try {
    const found = JSON.parse(of("tools") || "null");
    return Array.isArray(found) && found.length ? found : null;
  } catch {
    return null;
  }
}

/** What goes along with every request: the model's name and all changed options. */
export function request({ isTemplate = false } = {}) {
  const changed = Object.entries(values).filter(([name]) => !OWN.has(name) && !(isTemplate && OF_ANSWERS.has(name)));
  return { ...Object.fromEntries(changed), ...(model() ? { model: model() } : {}), stream: true, ...(showsDrafts() ? { drafts: true } : {}) };
}

/** The name of the model that is asked; undefined until the server has named one. */
export function model() {
  const chosen = of("model");
  return models.some((other) => other.id === chosen) ? chosen : models[0]?.id;
}

export function setModels(found) {
  models = found;
  const choice = byId("model-choice");
  choice.replaceChildren(...found.map((one) => el("option", { value: one.id }, one.id)));
  choice.value = model() ?? "";
  const one = found.find((other) => other.id === model());
  showPurpose();
  document.dispatchEvent(new Event("sfumato:models"));
  byId("model-doc").textContent = one ? `Canvas of ${one.canvas_length} tokens, context of ${one.max_model_len}.` : "";
}

/** What the model is for, if it is for one thing alone: {purpose, prompt}, a sentence and what stands in its prompts. */
function purpose() {
  const stated = models.find((one) => one.id === model())?.purpose;
  const { purpose: sentence = "", prompt = "" } = typeof stated === "string" ? { purpose: stated } : stated ?? {};
  return { sentence, prompt };
}

/** What to say of a message that is not what the model is for. */
export function hintFor(message) {
  const { sentence, prompt } = purpose();
  return sentence && prompt && !message.includes(prompt) ? `${sentence}.`.replace("..", ".") : "";
}

/** The model's purpose as a note, until it is dismissed. */
function showPurpose() {
  const { sentence } = purpose();
  byId("purpose").hidden = !sentence || load("purpose", "") === sentence;
  const dismiss = () => {
    save("purpose", sentence);
    byId("purpose").hidden = true;
    byId("message").focus();
  };
  const remedy = ["For anything else start the server with another model: ", el("code", {}, "sfumato serve owner/name")];
  byId("purpose").replaceChildren(el("p", {}, `${sentence.replace(/\.$/, "")}. `, ...remedy), el("button", { class: "quiet small", type: "button", "aria-label": "Dismiss the note", onclick: dismiss }, "×"));
}

/** Whether a value that was kept is one of this option. */
export function isOf(option, value) {
  if (value === undefined || value === null) return false;
  if (option.type === "array") return Array.isArray(value) && value.every((text) => typeof text === "string");
  if (option.type === "integer" || option.type === "number") return typeof value === "number";
  return option.type === "object" || (typeof value === option.type && (!option.choices || option.choices.includes(value)));
}

/** A field's text as the option's value; undefined for “as the default”; throws what is wrong with it. */
function readField(option, field) {
  if (option.type === "boolean") return field.checked;
  const text = field.value;
  if (text.trim() === "") return undefined;
  if (option.choices) return text;
  if (option.type === "integer" || option.type === "number") {
    const number = Number(text);
    const isWhole = option.type === "integer";
    if (!Number.isFinite(number) || (isWhole && !Number.isInteger(number))) throw new Error(`Give a ${isWhole ? "whole " : ""}number.`);
    if (number < (option.minimum ?? -Infinity)) throw new Error(`At least ${option.minimum}.`);
    if (number > (option.maximum ?? Infinity)) throw new Error(`At most ${option.maximum}.`);
    return number;
  }
  if (option.type === "array") return text.split("\n").filter(Boolean);
  if (option.type === "object") {
    try {
      return JSON.parse(text);
    } catch {
      throw new Error("This is not JSON.");
    }
  }
  return text;
}

function asText(option, value) {
  if (value === null || value === undefined) return "";
  if (option.type === "array") return value.join("\n");
  return option.type === "object" ? JSON.stringify(value, null, 1) : String(value);
}

function fieldFor(option, id) {
  const described = { id, "aria-describedby": `${id}-doc`, name: option.name };
  const standard = asText(option, option.default);
  if (option.type === "boolean") return el("input", { type: "checkbox", ...described });
  if (option.choices) {
    return el("select", described, el("option", { value: "" }, standard ? `default (${standard})` : "default"),
      ...option.choices.map((choice) => el("option", { value: choice }, choice)));
  }
  if (option.type === "integer" || option.type === "number") {
    const inputmode = option.type === "integer" ? "numeric" : "decimal";
    return el("input", { type: "text", inputmode, autocomplete: "off", placeholder: standard || "none", ...described });
  }
  const hint = { array: "one a line", object: "JSON" }[option.type] ?? "none";
  return el("textarea", { rows: 1, spellcheck: "false", placeholder: standard || hint, ...described });
}

function settingFor(option) {
  const id = `option-${option.name}`;
  const field = fieldFor(option, id);
  const wrong = el("p", { class: "wrong", id: `${id}-wrong`, hidden: true });
  const back = el("button", { class: "quiet", type: "button", "aria-label": `Set ${option.name} to its default`, hidden: true }, "Default");
  const row = el("div", { class: "setting" },
    el("label", { for: id }, nameOf(option.name), el("code", {}, option.name)),
    el("div", { class: "field" }, field, back, wrong),
    el("p", { class: "doc", id: `${id}-doc`, title: option.doc }, WORDS[option.name]?.[1] || (option.doc ?? "").replaceAll("`", "")));
  const fill = () => {
    const value = values[option.name] ?? null;
    if (option.type === "boolean") field.checked = value ?? Boolean(option.default);
    else field.value = asText(option, value);
    mark(value !== null);
  };
  const mark = (isChanged) => {
    back.hidden = !isChanged;
    row.classList.toggle("changed", isChanged);
    wrong.hidden = true;
    field.removeAttribute("aria-invalid");
  };
  field.addEventListener(field.tagName === "SELECT" || field.type === "checkbox" ? "change" : "input", () => {
    try {
      const value = readField(option, field);
      const isChanged = value !== undefined && JSON.stringify(value) !== JSON.stringify(option.default);
      if (isChanged) values[option.name] = value;
      else delete values[option.name];
      mark(isChanged);
    } catch (error) {
      delete values[option.name];
      mark(false);
      wrong.textContent = `${error.message} Until then the default is sent.`;
      wrong.hidden = false;
      field.setAttribute("aria-invalid", "true");
    }
    save("options", values);
  });
  back.addEventListener("click", () => {
    delete values[option.name];
    save("options", values);
    fill();
    field.focus();
  });
  fill();
  return row;
}

export async function fetchOptions() {
  const box = byId("options");
  try {
    const { options } = await get("v1/options");
    values = Object.fromEntries(options.filter((option) => isOf(option, values[option.name])).map(({ name }) => [name, values[name]]));
    save("options", values);
    const named = (name) => options.filter((option) => option.name === name);
    const grouped = Object.entries(GROUPS).map(([title, names]) => [title, names.flatMap(named)]);
    const placed = new Set(Object.values(GROUPS).flat());
    grouped.push(["For those who know the sampler", options.filter((option) => !placed.has(option.name) && !OWN.has(option.name))]);
    const groups = grouped.filter(([, some]) => some.length).map(([title, some], at) => {
      if (at < Object.keys(GROUPS).length) return el("fieldset", { class: "group" }, el("legend", {}, title), ...some.map(settingFor));
      return el("details", { class: "group", open: some.some(({ name }) => name in values) }, el("summary", {}, title), ...some.map(settingFor));
    });
    box.replaceChildren(...groups);
  } catch (error) {
    box.replaceChildren(trouble(error, fetchOptions));
  }
}

export function start({ onKey }) {
  const form = byId("settings-form");
  form.addEventListener("submit", (event) => event.preventDefault());
  const keyField = byId("key");
  const remember = byId("remember");
  const keepKey = () => {
    setKey(keyField.value.trim(), remember.checked);
    onKey();
  };
  keyField.addEventListener("change", keepKey);
  remember.addEventListener("change", keepKey);
  for (const id of ["system", "tools"]) {
    byId(id).value = of(id);
    byId(id).addEventListener("input", () => save(`settings.${id}`, byId(id).value));
  }
  byId("tools").addEventListener("input", checkTools);
  checkTools();
  byId("drafts").checked = showsDrafts();
  byId("drafts").addEventListener("change", () => save("settings.drafts", byId("drafts").checked));
  byId("model-choice").addEventListener("change", () => {
    save("settings.model", byId("model-choice").value);
    setModels(models);
  });
  byId("reset").addEventListener("click", () => {
    values = {};
    save("options", values);
    fetchOptions();
  });
}

/** The key may have been given elsewhere. */
export function enter() {
  byId("key").value = key();
  byId("remember").checked = isKeyRemembered();
  if (!byId("options").firstChild || byId("options").querySelector(".trouble")) fetchOptions();
}

function checkTools() {
  const isWrong = Boolean(of("tools").trim()) && !tools();
  byId("tools-wrong").textContent = "This is not a JSON list; until it is, no tools are sent.";
  byId("tools-wrong").hidden = !isWrong;
  byId("tools").setAttribute("aria-invalid", String(isWrong));
}
