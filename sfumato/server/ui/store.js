// What the browser keeps: small JSON values by name. A browser that keeps nothing (private mode, full) is no error, and
// what it kept is believed only as far as it can be: another program, or another version of this page, may have written.

const name = (key) => `sfumato.${key}`;

const kindOf = (value) => (Array.isArray(value) ? "array" : value === null ? "null" : typeof value);

/** What was kept, if it is of the same kind as `otherwise`. `storage` is a name: merely to look at it may throw. */
export function load(key, otherwise, storage = "localStorage") {
  try {
    const found = JSON.parse(globalThis[storage].getItem(name(key)));
    return kindOf(found) === kindOf(otherwise) ? found : otherwise;
  } catch {
    return otherwise;
  }
}

/** Whether it could be kept. */
export function save(key, value, storage = "localStorage") {
  try {
    globalThis[storage].setItem(name(key), JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function forget(key, storage = "localStorage") {
  try {
    globalThis[storage].removeItem(name(key));
  } catch {
    // Nothing was kept.
  }
}

/** The names of all that is kept. */
export function kept() {
  try {
    return Object.keys(globalThis.localStorage).filter((key) => key.startsWith(name(""))).map((key) => key.slice(name("").length));
  } catch {
    return [];
  }
}

/** Keep a text that is being typed: for this tab, and for the next one if this is closed. */
export function saveTyped(key, text) {
  save(key, text, "sessionStorage");
  save(key, text);
}

/** Keep a field's text as it is typed, and bring it back after a reload. */
export function keepTyped(field, key) {
  if (!field.value) field.value = load(key, "", "sessionStorage") || load(key, "");
  field.addEventListener("input", () => saveTyped(key, field.value));
}
