// Which attributes can be added to the description, or taken away? Rows of chips, opened with "Details".

import { chipFor } from "./prompt.js";
import { h } from "./ui.js";

const GROUPS = [ // +Name is the attribute, -Name its opposite; the words are the server's
  ["Person", "-Male +Male +Young -Young +Attractive +Chubby"],
  ["Expression", "+Smiling -Smiling +Mouth_Slightly_Open -Mouth_Slightly_Open"],
  ["Hair", "+Black_Hair +Brown_Hair +Blond_Hair +Gray_Hair +Wavy_Hair +Straight_Hair +Bangs +Receding_Hairline +Bald"],
  ["Beard", "-No_Beard +Goatee +Mustache +Sideburns +5_o_Clock_Shadow +No_Beard"],
  ["Worn", "+Eyeglasses -Eyeglasses +Wearing_Hat +Wearing_Earrings +Wearing_Necklace +Wearing_Necktie "
    + "+Wearing_Lipstick +Heavy_Makeup -Heavy_Makeup"],
  ["Face", "+Oval_Face +High_Cheekbones +Rosy_Cheeks +Pale_Skin +Double_Chin +Arched_Eyebrows +Bushy_Eyebrows "
    + "+Narrow_Eyes +Bags_Under_Eyes +Big_Nose +Pointy_Nose +Big_Lips"],
];

export function fillPalette(box) {
  box.append(...GROUPS.map(([title, facts]) => h("div.palette-row", { role: "group", "aria-label": title },
    h("span.quiet", { text: title, "aria-hidden": "true" }),
    h("div.chips", ...facts.split(" ").map((fact) => chipFor(fact.slice(1), fact[0] === "+", true))))));
}
