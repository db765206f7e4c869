// How do fingers and the wheel move and zoom what they touch?

import { on } from "./ui.js";

/**
 * `point(event)` is where something is touched, [x, y]; `move(x, y)` is told by how much it went on, and
 * `zoom(factor, middle)` by how much two fingers parted, or the wheel was turned (`wheel` pixels are a
 * factor of e). Gives the fingers.
 */
export function gestures(target, point, move, zoom, wheel = 300) {
  const fingers = new Map();
  on(target, "wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / wheel), point(event));
  }, { passive: false });
  on(target, "pointerdown", (event) => {
    fingers.set(event.pointerId, point(event));
    target.setPointerCapture(event.pointerId);
  });
  on(target, "pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = point(event);
    const [, other] = [...fingers].find(([id]) => id !== event.pointerId) ?? [];
    fingers.set(event.pointerId, now);
    move((now[0] - before[0]) / fingers.size, (now[1] - before[1]) / fingers.size);
    if (!other) return;
    const apart = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
    zoom(apart(now) / apart(before), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
  });
  for (const end of ["pointerup", "pointercancel"]) on(target, end, (event) => fingers.delete(event.pointerId));
  return fingers;
}
