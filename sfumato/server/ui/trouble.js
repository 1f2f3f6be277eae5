// A trouble, shown at the place where it happened, with the way out beside it.

import { isKeyRemembered, setKey } from "./api.js";
import { announce, el } from "./dom.js";

const TITLES = {
  offline: "The server does not answer",
  key: "The server asks for an API key",
  busy: "The server is busy",
  worker: "The engine was restarted",
  broken: "The answer broke off",
  refused: "The request was refused",
  failed: "The server failed",
};

const ADVICE = {
  offline: "Is sfumato serve still running? What you wrote is kept.",
  key: "",
  busy: "Others are being answered. What you wrote is kept.",
  worker: "The request can be sent again.",
  broken: "What had arrived is kept.",
  refused: "",
  failed: "What you wrote is kept.",
};

/** A card for `error` with a button that calls `retry`; after a 401 with a field for the key. */
export function trouble(error, retry) {
  const kind = TITLES[error.kind] ? error.kind : "failed";
  const words = [error.message, ADVICE[kind], error.wait && kind === "busy" ? `It suggests to wait ${error.wait} s.` : ""];
  const card = el("div", { class: "trouble", "data-kind": kind });
  const again = () => {
    card.remove();
    retry();
  };
  card.append(el("h3", {}, TITLES[kind]), el("p", {}, words.filter(Boolean).join(" ")));
  if (kind === "key") {
    const field = el("input", { type: "password", "aria-label": "API key", autocomplete: "off", spellcheck: "false" });
    const remember = el("input", { type: "checkbox" });
    remember.checked = isKeyRemembered();
    const use = (event) => {
      event.preventDefault();
      if (!field.value.trim()) return field.focus();
      setKey(field.value.trim(), remember.checked);
      document.dispatchEvent(new Event("sfumato:look"));
      again();
    };
    card.append(
      el("form", { class: "row", onsubmit: use }, field, el("button", { class: "primary", type: "submit" }, "Use the key and try again"),
        el("label", { class: "check" }, remember, " Remember on this device")),
    );
  } else {
    const settings = kind === "refused" && error.param ? el("a", { href: "#/settings" }, "Open the settings") : null;
    card.append(el("div", { class: "row" }, el("button", { type: "button", onclick: again }, "Try again"), settings));
  }
  announce(`${TITLES[kind]}. ${error.message}`);
  return card;
}
