// What the browser keeps: small JSON values by name. A browser that keeps nothing (private mode, full) is no error.

const name = (key) => `sfumato.${key}`;

export function load(key, otherwise, storage = localStorage) {
  try {
    const text = storage.getItem(name(key));
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Whether it could be kept. */
export function save(key, value, storage = localStorage) {
  try {
    storage.setItem(name(key), JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function forget(key, storage = localStorage) {
  try {
    storage.removeItem(name(key));
  } catch {
    // Nothing was kept.
  }
}

/** Keep a field's text as it is typed, and bring it back after a reload. */
export function keepTyped(field, key) {
  if (!field.value) field.value = load(key, "");
  field.addEventListener("input", () => save(key, field.value));
}
