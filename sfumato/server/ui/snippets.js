// The request that the page sends, as others would write it: JSON, curl, and Python with two clients.

import { Raw, conditionOf, json, ordered, recordOf } from "./questions.js";

const python = (value, indent = "") => {
  const deeper = `${indent}    `;
  if (value instanceof Raw) return /^[-0-9]/.test(value.text) ? value.text : python(ordered(value.text), indent);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const parts = isList ? value.map((one) => python(one, deeper)) : [...(value instanceof Map ? value : Object.entries(value))].map(([name, one]) => `${JSON.stringify(name)}: ${python(one, deeper)}`);
  const [open, close] = isList ? "[]" : "{}";
  const line = open + parts.join(", ") + close;
  return line.length + indent.length < 88 && !line.includes("\n") ? line : `${open}\n${parts.map((part) => `${deeper}${part},\n`).join("")}${indent}${close}`;
};

const CLASSES = { noul: "Noul", choice: "Choice", score: "Score", x_span: "Span" };

function call(question, all, hasConditions) {
  const record = recordOf(question);
  record.delete("type");
  if (hasConditions && conditionOf(question, all)) record.set("depends_on", conditionOf(question, all));
  const parts = [...record].map(([name, value]) => `${name}=${python(value, "            ")}`);
  const line = `${CLASSES[question.kind]}(${parts.join(", ")})`;
  return line.length < 80 && !line.includes("\n") ? line : `${CLASSES[question.kind]}(\n${parts.map((part) => `            ${part},\n`).join("")}        )`;
}

const questionsOf = (some, all, hasConditions) => `{\n${some.map((one) => `        ${JSON.stringify(one.id)}: ${call(one, all, hasConditions)},\n`).join("")}    }`;
const classesOf = (some) => [...new Set(some.map(({ kind }) => CLASSES[kind]))].sort().join(", ");

/** `body` is the request's Map, `all` its questions; `where` the server's address, `hasKey` whether it asks for a key. */
export const SNIPPETS = {
  "JSON request": ({ body }) => `${json(body, "  ")}\n`,
  curl: ({ body, where, hasKey }) => {
    const key = hasKey ? ' \\\n  -H "Authorization: Bearer $SFUMATO_API_KEY"' : "";
    return `curl ${where}/v1/systemone -H "Content-Type: application/json"${key} -d @- <<'END'\n${json(body, "  ")}\nEND\n`;
  },
  "Python, typesafe-sdk": ({ body, all, where, hasKey }) => {
    const some = all.filter(({ kind }) => kind !== "x_span");
    const left = [...body.keys()].some((name) => name.startsWith("x_")) || some.length < all.length || some.some(({ parent }) => parent);
    const key = hasKey ? 'os.environ["SFUMATO_API_KEY"]' : '"none"';
    const note = left ? "# Without what is this server's own: its settings, passages, conditions. The other forms have them.\n" : "";
    return `${note}${hasKey ? "import os\n\n" : ""}from typesafe_sdk import ${[...new Set([...classesOf(some).split(", ").filter(Boolean), "TypeSafeClient"])].join(", ")}

with TypeSafeClient(base_url=${JSON.stringify(where)}, api_key=${key}, model=${python(body.get("model"))}) as client:
    answers = client.system_one(
        state=${python(body.get("state"), "        ")},
        questions=${questionsOf(some, all, false).replaceAll("\n", "\n    ")},
    ).answers
for id, answer in answers.items():
    print(id, answer)
`;
  },
  "Python, sfumato": ({ body, all, where, hasKey }) => {
    const options = [...body].filter(([name]) => name.startsWith("x_")).map(([name, value]) => `    ${name.slice(2)}=${python(value)},\n`);
    return `${hasKey ? "import os\n\n" : ""}from sfumato import LLM, ${classesOf(all)}

llm = LLM.connect(${JSON.stringify(where)}${hasKey ? ', api_key=os.environ["SFUMATO_API_KEY"]' : ""}, model=${python(body.get("model"))})
answers = llm.decide(
    ${python(body.get("state"), "    ")},
    ${questionsOf(all, all, true)},
${options.join("")})
for id, answer in answers.items():
    print(id, answer.choice, answer.probabilities)
`;
  },
};
