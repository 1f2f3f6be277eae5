// Mathematics as text: TeX's names as signs, raised and lowered parts, fractions with a stroke. No typesetting.

import { el, filled } from "./dom.js";

const pairs = (text) => Object.fromEntries(text.split(" ").map((pair) => [pair.slice(0, -1), pair.slice(-1)]));

const SIGNS = {
  ...pairs("alphaα betaβ gammaγ deltaδ epsilonε varepsilonε zetaζ etaη thetaθ iotaι kappaκ lambdaλ muμ nuν xiξ piπ rhoρ sigmaσ tauτ phiφ varphiφ chiχ psiψ omegaω GammaΓ DeltaΔ ThetaΘ LambdaΛ XiΞ PiΠ SigmaΣ PhiΦ PsiΨ OmegaΩ times× cdot· div÷ pm± mp∓ leq≤ le≤ geq≥ ge≥ neq≠ ne≠ approx≈ equiv≡ sim∼ propto∝ infty∞ partial∂ nabla∇ sum∑ prod∏ int∫ in∈ notin∉ subset⊂ subseteq⊆ cup∪ cap∩ emptyset∅ forall∀ exists∃ neg¬ land∧ lor∨ to→ rightarrow→ leftarrow← Rightarrow⇒ implies⇒ iff⇔ Leftrightarrow⇔ mapsto↦ ldots… cdots⋯ dots… sqrt√ langle⟨ rangle⟩ hbarℏ degree° angle∠ circ∘ star⋆ perp⊥ mid∣ quad\u2003"),
  ell: "ℓ", left: "", right: "", displaystyle: "", ",": "\u2009", ";": " ", "!": "", "\\": "\n", "{": "{", "}": "}", "%": "%", "$": "$", "&": "&", "#": "#", _: "_", " ": " ",
};
const UPRIGHT = /^(text|mathrm|mathbf|operatorname|textbf|mathit|mathbb|mathcal|boldsymbol)$/;
const DEEPEST = 12;

/** A box of mathematics; its TeX is its title. */
export function showMath(tex, isBlock) {
  const box = el(isBlock ? "div" : "span", { class: isBlock ? "math scroll" : "math", role: "math", "aria-label": tex, dir: "ltr", tabindex: isBlock ? "0" : null });
  const marks = tex.match(/\\[A-Za-z]+|\\[^]|[{}^_&]|[^\\{}^_&]+/g) ?? [];
  let at = 0;

  const group = (depth) => {
    while (marks[at] !== undefined && !marks[at].trim()) at++;
    if (marks[at] === "{") {
      at++;
      const inside = run(depth + 1);
      at++; // its }
      return inside;
    }
    const mark = marks[at] ?? "";
    if (!mark || mark === "}") return [];
    if (mark.length > 1 && mark[0] !== "\\") {
      const [first] = mark.trimStart();
      marks[at] = mark.trimStart().slice(first.length);
      return [first];
    }
    return one(depth + 1);
  };
  const stroked = (parts) => (parts.join("").length > 1 || parts.length > 1 ? ["(", ...parts, ")"] : parts);
  const one = (depth) => {
    const mark = marks[at++];
    if (depth > DEEPEST) return [mark];
    if (mark === "^" || mark === "_") return [filled(el(mark === "^" ? "sup" : "sub"), group(depth))];
    if (mark === "{") {
      at--;
      return group(depth);
    }
    if (mark === "&") return ["\u2003"];
    if (mark[0] !== "\\") return [mark];
    const name = mark.slice(1);
    if (name === "frac" || name === "dfrac" || name === "tfrac") return [...stroked(group(depth)), "⁄", ...stroked(group(depth))];
    if (name === "sqrt") return ["√", ...stroked(group(depth))];
    if (UPRIGHT.test(name)) return [filled(el("span", { class: "upright" }), group(depth))];
    if (name === "begin" || name === "end") return (group(depth), []);
    return [Object.hasOwn(SIGNS, name) ? SIGNS[name] : name];
  };
  function run(depth) {
    const parts = [];
    while (at < marks.length && !(depth && marks[at] === "}")) for (const part of one(depth)) parts.push(part);
    return parts;
  }
  return filled(box, run(0));
}
