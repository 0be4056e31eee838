// Does a text still follow the JSON schema its app asked for? Runs in a worker (`checker.js`), which is ended when a
// stranger's pattern, or a schema that refers to itself, takes too long. What is left out (`unevaluated…`,
// `$dynamicRef`, references to other documents) asks for nothing here.

import { hasFormat } from "./formats.js";

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
  const say = (problem) => at.found.push(`${path || "the answer"} ${problem}`);
  if (schema === false) say("may not be there");
  if (typeof schema !== "object" || schema === null || at.depth > DEEPEST) return;
  if (at.found.length >= MOST_PROBLEMS) return;
  const deeper = { ...at, depth: at.depth + 1 };
  if (typeof schema.$ref === "string") check(value, resolve(schema.$ref, at.root), path, deeper);
  if (schema.type !== undefined && ![schema.type].flat().some((type) => isOf(value, type))) {
    say(`is ${nameOf(value)}, not ${[schema.type].flat().join(" or ")}`);
    return;
  }
  if (Array.isArray(schema.enum) && !schema.enum.some((one) => same(one, value))) say("is none of the values allowed");
  if (Object.hasOwn(schema, "const") && !same(schema.const, value)) say(`is not ${JSON.stringify(schema.const)}`);
  if (typeof value === "number") numbers(value, schema, say);
  if (typeof value === "string") string(value, schema, say);
  if (Array.isArray(value)) list(value, schema, path, deeper, say);
  else if (isOf(value, "object")) object(value, schema, path, deeper, say);
  choices(value, schema, path, deeper, say);
}

function numbers(value, schema, say) {
  if (value < schema.minimum || value <= schema.exclusiveMinimum) say("is too small");
  if (value > schema.maximum || value >= schema.exclusiveMaximum) say("is too large");
  const step = schema.multipleOf;
  if (step > 0 && Math.abs(value / step - Math.round(value / step)) > 1e-9) say(`is no multiple of ${step}`);
}

function string(value, schema, say) {
  sizes([...value].length, schema.minLength, schema.maxLength, "characters", say);
  if (typeof schema.pattern === "string" && !matches(value, schema.pattern)) say(`does not match ${schema.pattern}`);
  if (typeof schema.format === "string" && !hasFormat(value, schema.format)) say(`is no ${schema.format}`);
}

// A pattern that is none asks for nothing.
function matches(text, pattern) {
  try {
    return new RegExp(pattern, "u").test(text);
  } catch {
    return true;
  }
}

function sizes(size, least, most, what, say) {
  if (size < least) say(`has fewer than ${least} ${what}`);
  if (size > most) say(`has more than ${most} ${what}`);
}

function list(value, schema, path, at, say) {
  sizes(value.length, schema.minItems, schema.maxItems, "entries", say);
  const first = Array.isArray(schema.prefixItems) ? schema.prefixItems : [];
  value.forEach((one, index) => check(one, index < first.length ? first[index] : schema.items, `${path}[${index}]`, at));
  if (schema.uniqueItems === true && new Set(value.map(canonical)).size < value.length) say("has an entry twice");
  if (schema.contains === undefined) return;
  const fitting = value.filter((one) => fits(one, schema.contains, path, at)).length;
  if (fitting < (schema.minContains ?? 1) || fitting > schema.maxContains) say("does not hold the entries it must");
}

function object(value, schema, path, at, say) {
  const within = (name) => (path ? `${path}.${name}` : name);
  const names = Object.keys(value);
  sizes(names.length, schema.minProperties, schema.maxProperties, "keys", say);
  const dependent = Object.entries(schema.dependentRequired ?? {}).filter(([name]) => Object.hasOwn(value, name));
  const required = [...(schema.required ?? []), ...dependent.flatMap(([, others]) => others)];
  for (const name of required) if (!Object.hasOwn(value, name)) say(`has no ${name}`);
  for (const name of names) {
    if (schema.propertyNames !== undefined) check(name, schema.propertyNames, `the key ${name}`, at);
    const wanted = propertySchemas(name, schema);
    for (const one of wanted) check(value[name], one, within(name), at);
    if (wanted.length === 0 && schema.additionalProperties === false) say(`may have no ${name}`);
    else if (wanted.length === 0) check(value[name], schema.additionalProperties, within(name), at);
  }
  for (const [name, one] of Object.entries(schema.dependentSchemas ?? {})) {
    if (Object.hasOwn(value, name)) check(value, one, path, at);
  }
}

function propertySchemas(name, schema) {
  const patterns = Object.entries(schema.patternProperties ?? {}).filter(([pattern]) => matches(name, pattern));
  const own = Object.hasOwn(schema.properties ?? {}, name) ? [schema.properties[name]] : [];
  return [...own, ...patterns.map(([, one]) => one)];
}

function fits(value, schema, path, at) {
  const found = [];
  check(value, schema, path, { ...at, found });
  return found.length === 0;
}

function choices(value, schema, path, at, say) {
  const fitting = (one) => fits(value, one, path, at);
  for (const one of schema.allOf ?? []) check(value, one, path, at);
  if (Array.isArray(schema.anyOf) && !schema.anyOf.some(fitting)) say("fits none of its alternatives");
  if (Array.isArray(schema.oneOf) && schema.oneOf.filter(fitting).length !== 1) say("fits not exactly one alternative");
  if (schema.not !== undefined && fitting(schema.not)) say("is what it must not be");
  if (schema.if !== undefined) check(value, fitting(schema.if) ? schema.then : schema.else, path, at);
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
  return canonical(one) === canonical(other);
}

// The order of an object's keys means nothing.
function canonical(value) {
  return JSON.stringify(value, (_, one) => (isOf(one, "object") ? Object.fromEntries(Object.entries(one).sort()) : one));
}
