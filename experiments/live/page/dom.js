// What all parts of the page draw with.

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** A new element: its name with a class, attributes (null: none), and what is in it. */
export function make(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  return fill(document.createElement(tag), classes, attributes, children);
}

/** The same for SVG. */
export function draw(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), classes, attributes, children);
}

function fill(element, classes, attributes, children) {
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Text is written only where it differs from what was written last: a page that writes nothing paints nothing. */
export function write(element, text) {
  if (element.written !== text) element.textContent = element.written = text;
}

/** Sets an attribute where it differs from what was set last; null removes it. */
export function mark(element, name, value) {
  const had = (element.marked ??= {});
  if (had[name] === value) return;
  had[name] = value;
  if (value === null) element.removeAttribute(name);
  else element.setAttribute(name, value);
}

/** Keeps one child of `parent` for each item, in order: made by `create(item)` once for each `key(item)`, then
 * brought up to date by `update(child, item, index)`. */
export function keep(parent, items, key, create, update) {
  const had = (parent.kept ??= new Map());
  const has = new Map();
  let after = null;
  items.forEach((item, index) => {
    const name = key(item);
    const child = had.get(name) ?? create(item);
    has.set(name, child);
    update(child, item, index);
    const place = after ? after.nextSibling : parent.firstChild;
    if (place !== child) parent.insertBefore(child, place);
    after = child;
  });
  for (const [name, child] of had) if (!has.has(name)) child.remove();
  parent.kept = has;
}

/** The colour of a cluster, as CSS. */
export const colour = (cluster) => (cluster === null || cluster === undefined ? "var(--none)" : `var(--c${cluster % 8})`);

/** Sets the colour of an element where it differs. */
export function paint(element, cluster) {
  const value = colour(cluster);
  if (element.painted !== value) element.style.setProperty("--c", (element.painted = value));
}

const PREFIXES = [[1e9, "Gbit/s"], [1e6, "Mbit/s"], [1e3, "kbit/s"], [1, "bit/s"]];

/** A rate in bit/s as people write it. */
export function rate(bits) {
  if (bits === null) return "no limit";
  const [size, unit] = PREFIXES.find(([least]) => bits >= least) ?? PREFIXES.at(-1);
  return `${significant(bits / size)}\u00a0${unit}`;
}

/** A part of 1 in per cent. */
export const percent = (part) => `${part > 0 && part < 0.0005 ? "< 0.1" : (100 * part).toFixed(part && part < 0.1 ? 1 : 0)}\u00a0%`;

/** Three significant digits. */
export function significant(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

/** One word for one or many. */
export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
