// How is this page used? Keys, what the marks under words mean, images that come back, and the appearance.

import { COMMAND, h, keep, openSheet, recall, segments } from "./ui.js";

const KEYS = [[`${COMMAND} ↵`, "Generate"], ["Esc", "Close what is open"],
  ["/", "To the description, or to the search"], ["g", "Gallery and back"],
  ["?", "This sheet"], [`${COMMAND} Z`, "Undo a deletion"], ["← → ↑ ↓", "Between images"], ["f", "Favourite"],
  ["+ − 0", "Zoom"],
  ["Space", "Play the steps"], ["d", "Download"], ["l", "Copy a link"], ["c", "Compare"], ["Del", "Delete"]];
const words = (kind, text) => h("span", { class: `legend-${kind}`, text });

export function openHelp() {
  const single = h("input", { type: "checkbox", id: "single-keys", change: () => keep("keys", single.checked) });
  single.checked = recall("keys", true);
  const themesOffered = [["System", ""], ["Light", "light"], ["Dark", "dark"]];
  const themes = segments(h("div.segments"), "theme", themesOffered, recall("theme", "") ?? "", (value) => {
    keep("theme", value || null);
    dispatchEvent(new Event("theme"));
  });
  openSheet("help", "Help", "", [
    h("div.help-columns",
      h("section", h("h3", "Keys"),
        h("dl.keys", ...KEYS.flatMap(([key, text]) => [h("dt", h("kbd", key)), h("dd", text)])),
        h("label.check", single, h("span", "Single keys work outside text fields"))),
      h("section", h("h3", "Words"),
        h("p", words("known", "Known"), " words were read often in training, ", words("rare", "rare"),
          " ones seldom, ", words("unknown", "unknown"), " ones never: the model ignores them. "
          + "The chips say what it understood; press one to take it out of the description."),
        h("h3", "Bring back an image"),
        h("p", "Every PNG generated here remembers its settings. Drop one on the page, or paste it, and they "
          + "come back. Of any other image the page says whether it was generated here, and you can start from it."),
        h("p", "“Add to Home Screen” or “Install” in the browser's menu keeps this page as an app. "
          + "On a phone, Share saves to the photos; so does a long press on an image."),
        h("fieldset.field", h("legend", "Appearance"), themes)))]);
}
