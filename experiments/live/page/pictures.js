// The users' pictures, framework by framework.

import { at, keep, make, mark, paint, significant, write } from "./dom.js";

let picked = null; // the framework that the viewer picked; else it is the present one

/** Takes in what one user has: a picture for each framework. */
export function takePictures(state, content) {
  const had = state.pictures.get(content.device)?.shown ?? new Map();
  const shown = new Map();
  for (const picture of content.pictures) {
    const before = had.get(picture.framework);
    const same = before && before.image.length === picture.image.length && before.image.every((b, i) => b === picture.image[i]);
    const url = same ? before.url : URL.createObjectURL(new Blob([picture.image], { type: "image/webp" }));
    if (before && !same) URL.revokeObjectURL(before.url);
    shown.set(picture.framework, { ...picture, url });
  }
  state.pictures.set(content.device, { device: content.device, shown });
}

export function forgetPictures(state) {
  for (const { shown } of state.pictures.values()) for (const { url } of shown.values()) URL.revokeObjectURL(url);
  state.pictures.clear();
  picked = null;
}

export function drawPictures(state, ...rest) {
  const framework = picked ?? latest(state);
  const clusters = new Map((state.view.round?.requests ?? []).map((request) => [request.device, request.cluster]));
  const users = [...state.pictures.values()].filter((user) => user.shown.has(framework));
  users.sort((a, b) => a.device.localeCompare(b.device, "en", { numeric: true }));
  drawChoice(state, framework, () => drawPictures(state, ...rest));
  keep(
    at("pictures"),
    users,
    (user) => user.device,
    () => {
      const piece = { image: make("img", { width: 128, height: 128, decoding: "async" }), wish: make("span"), facts: make("small") };
      return Object.assign(make("li", {}, make("figure", {}, piece.image, make("figcaption", {}, piece.wish, piece.facts))), { piece });
    },
    ({ piece, ...card }, user) => {
      const picture = user.shown.get(framework);
      mark(piece.image, "src", picture.url);
      mark(piece.image, "alt", `Picture of ${user.device}`);
      write(piece.wish, picture.prompt);
      const facts = [
        picture.outcome === "degraded" ? "degraded" : "",
        picture.quality === null ? "" : `quality ${picture.quality.toFixed(2)}`,
        picture.latency === null ? "" : `${significant(picture.latency)} s`,
        picture.energy === null ? "" : `${significant(picture.energy)} J`,
      ];
      write(piece.facts, facts.filter(Boolean).join(" · "));
      paint(piece.image, framework === state.view.round?.framework ? clusters.get(user.device) : null);
    },
  );
  at("pictures").closest("section").toggleAttribute("hidden", !state.pictures.size);
}

/** The present framework, or the last one that has pictures. */
function latest(state) {
  const present = state.view.round?.framework;
  const have = new Set([...state.pictures.values()].flatMap((user) => [...user.shown.keys()]));
  if (have.has(present)) return present;
  return (state.view.run?.frameworks ?? []).findLast((name) => have.has(name)) ?? present;
}

function drawChoice(state, framework, again) {
  const have = new Set([...state.pictures.values()].flatMap((user) => [...user.shown.keys()]));
  const frameworks = (state.view.run?.frameworks ?? []).filter((name) => have.has(name));
  keep(
    at("shown"),
    ["", ...frameworks],
    (name) => name,
    (name) => {
      if (!name) return at("shown").querySelector("legend");
      const input = make("input", { type: "radio", name: "shown", value: name });
      input.addEventListener("change", () => {
        picked = name;
        again();
      });
      return Object.assign(make("label", {}, input, name), { input });
    },
    (label, name) => {
      if (name && label.input.checked !== (name === framework)) label.input.checked = name === framework;
    },
  );
}
