// What changed between two texts, by words: the longest common subsequence of what lies between equal ends.

const MOST = 4_000_000; // cells of the table; beyond, the middle counts as changed as a whole

const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

/** [kind, text] pairs, kind one of "same", "old", "new"; neighbours differ in kind, what is old stands before what is new. */
export function diff(before, after) {
  const a = words(before);
  const b = words(after);
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a.at(-1 - tail) === b.at(-1 - tail)) tail++;
  const middle = between(a.slice(head, a.length - tail), b.slice(head, b.length - tail));
  const pairs = [["same", a.slice(0, head).join("")], ...middle, ["same", a.slice(a.length - tail).join("")]];
  return joined(pairs);
}

function between(a, b) {
  if (a.length * b.length > MOST) return [["old", a.join("")], ["new", b.join("")]];
  const width = b.length + 1;
  const common = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1 : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const pairs = [];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      pairs.push(["same", a[i]]);
      [i, j] = [i + 1, j + 1];
    } else if (j === b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) pairs.push(["old", a[i++]]);
    else pairs.push(["new", b[j++]]);
  }
  return pairs;
}

function joined(pairs) {
  const found = [];
  let held = { old: "", new: "" };
  const flush = () => {
    for (const kind of ["old", "new"]) if (held[kind]) found.push([kind, held[kind]]);
    held = { old: "", new: "" };
  };
  for (const [kind, text] of pairs) {
    if (!text) continue;
    if (kind !== "same") held[kind] += text;
    else {
      flush();
      if (found.at(-1)?.[0] === "same") found.at(-1)[1] += text;
      else found.push([kind, text]);
    }
  }
  flush();
  return found;
}
