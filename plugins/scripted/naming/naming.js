// Policy `naming`: what guests of each tenant may be called. Written in JavaScript, to show that the contract asks for no
// language: policies/wit, and nothing else, is what a plugin is made by. plugins/scripted/build makes it a component.
//
// Settings: { "tenants": { "acme": "^acme-[a-z]+$" }, "default": "^.{1,32}$", "taps": true }

const SCHEMA = JSON.stringify({
  $schema: "https://json-schema.org/draft/2020-12/schema",
  type: "object",
  additionalProperties: false,
  properties: {
    tenants: {
      type: "object",
      additionalProperties: { type: "string" },
      description: "Regular expressions that names of guests match, by tenant",
    },
    default: { type: "string", description: "For tenants that aren't named; without it, any name will do" },
    taps: { type: "boolean", description: "Whether interfaces of a guest begin with its name" },
  },
});

function reason(code, message, field, remedy) {
  return { code, severity: "medium", message, field: field ?? null, remedy: remedy ?? null, attrs: [] };
}

// Thrown: what a function that gives a result in the contract fails with.
function read(text) {
  const settings = JSON.parse(text);
  const wrong = [];
  const unknown = Object.keys(settings).filter((key) => !["tenants", "default", "taps"].includes(key));
  for (const key of unknown) {
    wrong.push(reason("bad-settings", `unknown key ${key}`, `settings.${key}`, "remove it or correct its spelling"));
  }
  const expression = (value, field) => {
    try {
      if (typeof value !== "string") throw new Error("a text is wanted");
      return new RegExp(value);
    } catch (error) {
      wrong.push(reason("bad-settings", `it is no regular expression: ${error.message}`, field, "correct it"));
      return null;
    }
  };
  const tenants = new Map();
  for (const [tenant, value] of Object.entries(settings.tenants ?? {})) {
    tenants.set(tenant, expression(value, `settings.tenants.${tenant}`));
  }
  const others = settings.default === undefined ? null : expression(settings.default, "settings.default");
  if (settings.taps !== undefined && typeof settings.taps !== "boolean") {
    wrong.push(reason("bad-settings", "true or false is wanted", "settings.taps", "write true or false"));
  }
  if (wrong.length > 0) throw wrong;
  return { tenants, others, taps: settings.taps === true };
}

export const meta = {
  describe() {
    return {
      name: "naming",
      version: "1.0.0",
      summary: "Policy: what guests of each tenant may be called.",
      settingsSchema: SCHEMA,
      reasons: ["name", "tap"],
      changes: [],
      needs: [],
      attrs: [],
    };
  },

  checkSettings(text) {
    read(text);
  },
};

export const gate = {
  admit(text, request) {
    let settings;
    try {
      settings = read(text);
    } catch (wrong) {
      return { tag: "deny", val: { reasons: wrong, attrs: [] } };
    }
    const { name, nets } = request.guest;
    const tenant = request.tenant.name;
    const reasons = [];
    const wanted = settings.tenants.get(tenant) ?? settings.others;
    if (wanted && !wanted.test(name)) {
      const message = `${name} is no name for a guest of tenant ${tenant}: ${wanted.source} is wanted`;
      reasons.push(reason("name", message, "name", "name it so"));
    }
    nets.forEach((net, slot) => {
      if (settings.taps && !net.tap.startsWith(name)) {
        const message = `interface ${net.tap} does not begin with ${name}`;
        reasons.push(reason("tap", message, `net[${slot}].tap`, "name it after the guest"));
      }
    });
    return reasons.length > 0
      ? { tag: "deny", val: { reasons, attrs: [] } }
      : { tag: "allow", val: { changes: [], warnings: [], attrs: [] } };
  },
};
