// The cell: the edge in the middle, devices where they are, their links, and how far their requests are.

import { at, draw, keep, mark, paint, percent, rate, write } from "./dom.js";
import { whereabouts } from "./requests.js";

const SIZE = 300; // half the side of the drawing, in its own units
const ROOM = 44; // of that, for labels at the rim
const MANY = 16; // devices from which labels are shown for the chosen one only
const CIRCLE = 2 * Math.PI;

const SMALL = 430; // pixels: a drawing narrower than that shows labels of the chosen device only

let canvas = null;
let width = 2 * SIZE; // pixels that the drawing has
let layout = null; // of the nodes as they were told last, on a screen as wide as it was then

export function drawCell(state, choose) {
  const nodes = state.view.cell?.nodes ?? [];
  at("cell").hidden = !nodes.length;
  if (!nodes.length) return;
  canvas ??= frame(() => drawCell(state, choose));
  if (layout?.nodes !== nodes || layout.width !== width) layout = place(nodes);
  const { devices, sites, places, far, size, zoom } = layout;
  const requests = new Map((state.view.round?.requests ?? []).map((request) => [request.device, request]));
  const steps = state.view.run?.steps ?? 28;

  keep(canvas.wires, devices, (device) => device.name, () => draw("line"), updateWire);
  keep(canvas.devices, devices, (device) => device.name, create, update);
  keep(canvas.sites, sites, (site) => site.name, makeSite, (group, site, index) => placeSite(group, site, index, sites.length));
  describe(state, devices, nodes, far);

  function create(device) {
    const piece = {
      body: draw("circle.body"),
      image: draw("image"),
      arc: draw("circle.arc"),
      label: draw("text.label"),
    };
    const spot = draw("g", {}, piece.body, piece.image, piece.arc, piece.label);
    const group = Object.assign(draw("g.device", {}, spot), { piece, spot });
    group.addEventListener("click", () => choose(device.name));
    return group;
  }

  function where(device) {
    const request = requests.get(device.name);
    return request ? whereabouts(request, state.progress.get(request.id), steps) : { done: 0 };
  }

  function updateWire(wire, device) {
    const [x, y] = places.get(device.name);
    const busy = where(device).to !== undefined;
    mark(wire, "class", busy ? "wire busy" : "wire");
    mark(wire, "x2", x.toFixed(1));
    mark(wire, "y2", y.toFixed(1));
    mark(wire, "stroke-width", ((busy ? 1.5 : 0) + breadth(device.down?.rate ?? null)).toFixed(2));
    mark(wire, "stroke-dasharray", (device.down?.loss ?? 0) >= 0.01 ? "5 4" : null);
  }

  function update(group, device) {
    const { piece } = group;
    const request = requests.get(device.name);
    const [x, y] = places.get(device.name);
    const { done } = where(device);
    paint(group, request?.cluster);
    const classes = ["device"];
    if (state.chosen === device.name) classes.push("chosen");
    if (device.state === "lost") classes.push("gone");
    mark(group, "class", classes.join(" "));
    mark(group.spot, "transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
    mark(piece.body, "r", size);
    const around = CIRCLE * (size + 3);
    mark(piece.arc, "r", size + 3);
    mark(piece.arc, "stroke-width", size > 10 ? 3.5 : 2.5);
    mark(piece.arc, "stroke-dasharray", `${((done / steps) * around).toFixed(1)} ${around.toFixed(1)}`);
    mark(piece.arc, "visibility", done ? "visible" : "hidden");
    const picture = state.pictures.get(device.name)?.shown?.get(state.view.round?.framework);
    mark(piece.image, "href", picture?.url ?? null);
    if (picture) {
      for (const [name, value] of [["x", -size], ["y", -size], ["width", 2 * size], ["height", 2 * size]]) mark(piece.image, name, value);
      mark(piece.image, "clip-path", `circle(${size - 1}px)`);
    }
    mark(piece.label, "y", (size + 4 + 12 * zoom).toFixed(1));
    write(piece.label, label(device));
  }
}

/** Where all nodes are drawn, and how large. */
function place(nodes) {
  const devices = nodes.filter((node) => node.role === "device").sort(byNumber);
  const others = nodes.filter((node) => node.role !== "device" && node.name !== "edge").sort(byNumber);
  const sites = [...nodes.filter((node) => node.name === "edge"), ...others];
  const far = Math.max(...devices.map((d) => (d.x === null ? 0 : Math.hypot(d.x, d.y))), 0);
  const metre = far ? (SIZE - ROOM) / far : 0;
  const zoom = Math.min(2.2, Math.max(1, (2 * SIZE) / width)); // what is small on the screen is drawn larger
  const size = (devices.length > MANY ? 9 : 19) * Math.sqrt(zoom);
  const labelled = devices.length <= MANY && width >= SMALL;
  const places = new Map();
  devices.forEach((device, index) => {
    const turn = (index / devices.length) * CIRCLE - CIRCLE / 4;
    const rim = SIZE - ROOM - 20;
    const spot = device.x !== null && far ? [device.x * metre, -device.y * metre] : [Math.cos(turn) * rim, Math.sin(turn) * rim];
    places.set(device.name, spot);
  });
  apart(places, size, labelled ? 0.6 : 1);
  const heights = [...places.values()].map(([, y]) => y);
  const top = sites.length > 1 ? -SIZE : Math.max(-SIZE, Math.min(-90, ...heights) - ROOM);
  const bottom = Math.min(SIZE, Math.max(90, ...heights) + ROOM);
  const same = layout && layout.devices.length === devices.length; // who moves may need more room, and keeps it
  const box = [same ? Math.min(top, layout.box[0]) : top, same ? Math.max(bottom, layout.box[1]) : bottom];
  mark(canvas.svg, "viewBox", [-SIZE, box[0], 2 * SIZE, box[1] - box[0]].map((n) => n.toFixed(0)).join(" "));
  drawRings(far, metre);
  mark(canvas.devices, "class", labelled ? null : "quiet");
  canvas.svg.style.setProperty("--zoom", zoom.toFixed(2));
  return { nodes, width, devices, sites, places, far, size, zoom, box };
}

function label(device) {
  const name = device.name.replace("device-", "");
  const down = device.down;
  if (!down) return name;
  return `${name} · ${rate(down.rate)}${down.loss ? ` · ${percent(down.loss)}` : ""}`;
}

/** All that is known of the link of the chosen device, or of the range of all of them. */
function describe(state, devices, nodes, far) {
  const device = nodes.find((node) => node.name === state.chosen);
  if (device) {
    const way = (name, w) => (w ? `${name} ${rate(w.rate)}, ${(1000 * w.delay).toFixed(0)} ms, ${percent(w.loss)} lost` : "");
    const facts = [
      device.name,
      device.profile,
      device.x === null ? "" : `${Math.hypot(device.x, device.y).toFixed(0)} m`,
      way("down", device.down),
      way("up", device.up),
    ];
    write(at("link"), facts.filter(Boolean).join(" · "));
  } else {
    write(at("link"), devices.some((d) => d.down) ? "Choose a device to see its link both ways." : "");
  }
  const there = devices.filter((d) => d.state !== "lost").length;
  const rates = devices.map((d) => d.down?.rate).filter((r) => r);
  const facts = [
    `${there} of ${state.view.run?.users ?? devices.length} devices`,
    far ? `up to ${far.toFixed(0)} m` : "",
    rates.length ? `${rate(Math.min(...rates))} to ${rate(Math.max(...rates))}` : "",
  ];
  write(at("cell-note"), facts.filter(Boolean).join(" · "));
}

function frame(again) {
  const parts = { rings: draw("g"), wires: draw("g"), devices: draw("g"), sites: draw("g") };
  const svg = draw("svg", { "aria-hidden": "true" }, parts.rings, parts.wires, parts.devices, parts.sites);
  at("map").append(svg);
  new ResizeObserver(([{ contentRect }]) => {
    width = contentRect.width || width;
    again();
  }).observe(at("map"));
  return { ...parts, svg };
}

function drawRings(far, metre) {
  const step = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((s) => far / s <= 4) ?? far;
  const rings = far ? Array.from({ length: Math.floor(far / step + 1e-6) }, (_, i) => (i + 1) * step) : [];
  keep(
    canvas.rings,
    rings,
    (metres) => metres,
    () => draw("g", {}, draw("circle.ring"), draw("text")),
    (group, metres) => {
      mark(group.children[0], "r", (metres * metre).toFixed(1));
      mark(group.children[1], "x", (Math.cos(CIRCLE / 14) * metres * metre + 4).toFixed(1));
      mark(group.children[1], "y", (Math.sin(CIRCLE / 14) * metres * metre + 4).toFixed(1));
      write(group.children[1], `${metres} m`);
    },
  );
}

function makeSite(site) {
  const inner = draw("text.inner", { y: 4 });
  const group = draw("g.site", {}, draw("rect", { x: -26, y: -16, width: 52, height: 32, rx: 9 }), inner);
  write(inner, site.name);
  return group;
}

/** The planning edge is in the middle, the others along the top. */
function placeSite(group, site, index, sites) {
  const x = index === 0 ? 0 : -SIZE + (index * 2 * SIZE) / sites;
  mark(group, "transform", `translate(${x.toFixed(1)} ${index === 0 ? 0 : -SIZE + 18})`);
}

/** Lines are wider where a link is faster. */
function breadth(bits) {
  return bits === null ? 1 : Math.min(4, Math.max(0.6, Math.log10(bits / 1e5)));
}

/** Devices that would lie on each other or on the edge move apart a little; their direction stays nearly the same.
 * Where labels stand below them, `flat` (under 1) asks for more room that way. */
function apart(places, size, flat) {
  const spots = [...places.values()];
  const gap = 2 * size + 10;
  for (let round = 0; round < 20; round += 1) {
    for (let i = 0; i < spots.length; i += 1) {
      for (let j = i + 1; j < spots.length; j += 1) push(spots[i], spots[j], gap, flat);
      const middle = [0, 0];
      push(middle, spots[i], size + 56, 1);
    }
  }
}

function push(a, b, gap, flat) {
  const [dx, dy] = [b[0] - a[0], b[1] - a[1]];
  const distance = Math.hypot(dx, flat * dy) || 0.01;
  if (distance >= gap) return;
  const by = Math.min(20, (gap - distance) / 2) / distance;
  a[0] -= dx * by;
  a[1] -= dy * by;
  b[0] += dx * by;
  b[1] += dy * by;
}

function byNumber(a, b) {
  return a.name.localeCompare(b.name, "en", { numeric: true });
}
