// Does a text still follow the JSON schema its app asked for? The common keywords; `pattern` and `format` are left out,
// because a pattern from outside could keep the page busy for ever.

const MOST_PROBLEMS = 5;
const DEEPEST = 64;

// null when there is nothing to hold the text to, else its problems, none when it is fine.
export function problemsOf(text, schema, original) {
  if (schema === null && !isJson(original)) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return [`no valid JSON: ${error.message}`];
  }
  if (schema === null) return [];
  const found = [];
  check(value, schema, "", { root: schema, found, depth: 0 });
  return found.slice(0, MOST_PROBLEMS);
}

function isJson(text) {
  if (!/^\s*[{[]/.test(text)) return false;
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

function check(value, schema, path, at) {
  if (schema === true || typeof schema !== "object" || schema === null || at.depth > DEEPEST) return;
  if (at.found.length >= MOST_PROBLEMS) return;
  const deeper = { ...at, depth: at.depth + 1 };
  const say = (problem) => at.found.push(`${path || "the answer"} ${problem}`);
  if (typeof schema.$ref === "string") check(value, resolve(schema.$ref, at.root), path, deeper);
  if (schema.type !== undefined && ![schema.type].flat().some((type) => isOf(value, type))) {
    say(`is ${nameOf(value)}, not ${[schema.type].flat().join(" or ")}`);
    return;
  }
  if (Array.isArray(schema.enum) && !schema.enum.some((one) => same(one, value))) say("is none of the values allowed");
  if ("const" in schema && !same(schema.const, value)) say(`is not ${JSON.stringify(schema.const)}`);
  if (typeof value === "number") numbers(value, schema, say);
  if (typeof value === "string") sizes([...value].length, schema.minLength, schema.maxLength, "characters", say);
  if (Array.isArray(value)) list(value, schema, path, deeper, say);
  else if (isOf(value, "object")) object(value, schema, path, deeper, say);
  choices(value, schema, path, deeper, say);
}

function numbers(value, schema, say) {
  if (value < schema.minimum || value <= schema.exclusiveMinimum) say("is too small");
  if (value > schema.maximum || value >= schema.exclusiveMaximum) say("is too large");
}

function sizes(size, least, most, what, say) {
  if (size < least) say(`has fewer than ${least} ${what}`);
  if (size > most) say(`has more than ${most} ${what}`);
}

function list(value, schema, path, at, say) {
  sizes(value.length, schema.minItems, schema.maxItems, "entries", say);
  const first = Array.isArray(schema.prefixItems) ? schema.prefixItems : [];
  value.forEach((one, index) => check(one, first[index] ?? schema.items, `${path}[${index}]`, at));
}

function object(value, schema, path, at, say) {
  const properties = schema.properties ?? {};
  const within = (name) => (path ? `${path}.${name}` : name);
  for (const name of schema.required ?? []) if (!Object.hasOwn(value, name)) say(`has no ${name}`);
  for (const [name, one] of Object.entries(value)) {
    if (Object.hasOwn(properties, name)) check(one, properties[name], within(name), at);
    else if (schema.additionalProperties === false) say(`may have no ${name}`);
    else check(one, schema.additionalProperties, within(name), at);
  }
}

function choices(value, schema, path, at, say) {
  const fits = (one) => {
    const found = [];
    check(value, one, path, { ...at, found });
    return found.length === 0;
  };
  for (const one of schema.allOf ?? []) check(value, one, path, at);
  if (Array.isArray(schema.anyOf) && !schema.anyOf.some(fits)) say("fits none of its alternatives");
  if (Array.isArray(schema.oneOf) && schema.oneOf.filter(fits).length !== 1) say("fits not exactly one alternative");
  if (schema.not !== undefined && fits(schema.not)) say("is what it must not be");
}

function resolve(reference, root) {
  if (!reference.startsWith("#")) return true;
  const steps = reference.slice(1).split("/").slice(1);
  const unescape = (step) => decodeURIComponent(step).replaceAll("~1", "/").replaceAll("~0", "~");
  return steps.reduce((schema, step) => schema?.[unescape(step)], root) ?? true;
}

function isOf(value, type) {
  if (type === "integer") return Number.isInteger(value);
  if (type === "object") return typeof value === "object" && value !== null && !Array.isArray(value);
  return nameOf(value) === type;
}

function nameOf(value) {
  if (value === null) return "null";
  return Array.isArray(value) ? "array" : typeof value;
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}
