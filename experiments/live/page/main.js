// The live page: what came over the bus goes into `state`, and the parts that it concerns are drawn again.

import { listen } from "./bus.js";
import { at } from "./dom.js";
import { drawCell } from "./cell.js";
import { drawClusters, drawRequests } from "./requests.js";
import { drawPictures, takePictures, forgetPictures } from "./pictures.js";
import { drawHead, drawNotes, drawStanding, drawTable } from "./run.js";

const state = {
  run: null, // the id of the run that is shown
  view: {}, // its parts by name, as experiments/live/scene.py has them
  pictures: new Map(), // by device
  progress: new Map(), // steps done and where, by request
  chosen: null, // the device that the viewer chose
  standing: "connecting",
};

const DRAWN = {
  run: [drawHead, drawTable],
  cell: [drawCell, drawRequests],
  round: [drawHead, drawCell, drawRequests, drawClusters, drawPictures, drawTable],
  table: [drawTable],
  notes: [drawNotes],
  pictures: [drawPictures, drawCell],
  progress: [drawRequests, drawCell],
};
const stale = new Set();

function concern(part) {
  for (const drawing of DRAWN[part]) stale.add(drawing);
}

function take(name, message) {
  const [node, what, part] = name.split("/");
  if (what === "progress" && message.type === "progress") {
    for (const [request, steps] of Object.entries(message.requests)) {
      if (steps >= (state.progress.get(request)?.steps ?? 0)) state.progress.set(request, { node, steps });
    }
    concern("progress");
  } else if (what === "view" && message.type === "view") {
    if (message.run !== state.run) begin(message.run);
    if (part.startsWith("of-")) {
      takePictures(state, message.content);
      concern("pictures");
    } else if (part in DRAWN) {
      if (part === "round" && message.content.round !== state.view.round?.round) state.progress.clear();
      state.view[part] = message.content;
      concern(part);
    }
  }
}

function begin(run) {
  forgetPictures(state);
  Object.assign(state, { run, view: {}, chosen: null });
  state.progress.clear();
  Object.keys(DRAWN).forEach(concern);
}

function draw() {
  const now = [...stale];
  stale.clear();
  for (const drawing of now) drawing(state, choose);
}

function choose(device) {
  state.chosen = state.chosen === device ? null : device;
  drawCell(state, choose);
  drawRequests(state, choose);
}

function standing(is) {
  state.standing = is;
  drawStanding(state);
}

const connect = listen({ take, draw, standing, wanted: () => !isOver() });

function isOver() {
  return ["finished", "failed", "interrupted"].includes(state.view.run?.status);
}

at("again").addEventListener("click", connect);
Object.keys(DRAWN).forEach(concern);
draw();
