// Making and changing elements. Text is only ever set as text: nothing that comes from elsewhere is markup.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Sets text only where it differs, so that selections stay and screen readers are not woken.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

// Text that somebody else chose: on its own as to its direction, and free to break anywhere.
export function foreign(text) {
  return make("bdi", { class: "foreign" }, text);
}

// Makes the children of `parent` those of `items`, keeping elements whose key is still there.
export function keyed(parent, items, key, create, update) {
  const have = new Map();
  for (const child of [...parent.children]) have.set(child.dataset.key, child);
  let at = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = have.get(name);
    if (child) have.delete(name);
    else {
      child = create(item);
      child.dataset.key = name;
    }
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
    update(child, item);
  }
  for (const child of have.values()) child.remove();
}

// Makes the contents of `parent` anew when `value` differs from last time; not while somebody is in it, who would
// lose the place, or what is selected to be copied.
const remembered = new WeakMap();
export function renewed(parent, value, build) {
  const text = JSON.stringify(value);
  if (remembered.get(parent) === text || parent.contains(document.activeElement)) return;
  remembered.set(parent, text);
  parent.replaceChildren(...build().filter(Boolean));
}

// A table whose cells are texts or nodes; the first column names the row. `numeric`: indexes of number columns.
export function table(label, heads, rows, numeric = []) {
  const cell = (tag, attributes, index, content) => {
    if (numeric.includes(index)) attributes.class = "number";
    return make(tag, attributes, content);
  };
  return make(
    "table",
    {},
    make("caption", { class: "unseen" }, label),
    make("thead", {}, make("tr", {}, ...heads.map((head, index) => cell("th", { scope: "col" }, index, head)))),
    make(
      "tbody",
      {},
      ...rows.map((row) =>
        make(
          "tr",
          {},
          ...row.map((content, index) =>
            index === 0 ? make("th", { scope: "row" }, content) : cell("td", {}, index, content),
          ),
        ),
      ),
    ),
  );
}

// Names and values. Values are texts or nodes.
export function facts(pairs) {
  const list = make("dl", { class: "facts" });
  for (const [name, value] of pairs) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return list;
}

// A command that selects itself when it is clicked or reached by keyboard, ready to be copied.
export function commandLine(text) {
  const code = make("code", {}, text);
  const line = make("pre", { class: "command", tabindex: "0" }, code);
  line.addEventListener("focus", () => getSelection().selectAllChildren(code));
  return line;
}

export function empty(text) {
  return make("p", { class: "empty" }, text);
}

export function quiet(text) {
  return make("p", { class: "quiet" }, text);
}

export function shape(name) {
  const NS = "http://www.w3.org/2000/svg";
  const drawn = document.createElementNS(NS, "svg");
  drawn.setAttribute("class", `shape ${name}`);
  drawn.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(NS, "use");
  use.setAttribute("href", `#shape-${name}`);
  drawn.append(use);
  return drawn;
}
