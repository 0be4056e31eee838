// The formats a JSON schema may ask for, those the engine's grammars know. Others say nothing about a text.

const DAY = /^(\d{4})-(\d\d)-(\d\d)$/;
const TIME = /^([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(z|[+-]([01]\d|2[0-3]):[0-5]\d)$/i;
const LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";
const HOST = new RegExp(`^${LABEL}(\\.${LABEL})*$`, "i");
const IPV4 = /^((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(\.(?!$)|$)){4}$/;

function day(text) {
  const found = DAY.exec(text);
  if (!found) return false;
  const [year, month, date] = found.slice(1).map(Number);
  const leap = year % 4 === 0 && (year % 100 !== 0 || year % 400 === 0);
  return month >= 1 && month <= 12 && date >= 1 && date <= [31, leap ? 29 : 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1];
}

function host(text) {
  return text.length <= 253 && HOST.test(text);
}

function ipv6(text) {
  if (!/^[\da-f:.]+$/i.test(text) || !text.includes(":")) return false;
  return URL.canParse(`http://[${text}]/`);
}

function email(text) {
  const at = text.lastIndexOf("@");
  return at > 0 && /^[^\s@"(),:;<>[\]\\]{1,64}$/.test(text.slice(0, at)) && host(text.slice(at + 1));
}

const KNOWN = {
  date: day,
  time: (text) => TIME.test(text),
  "date-time": (text) => /t/i.test(text[10] ?? "") && day(text.slice(0, 10)) && TIME.test(text.slice(11)),
  duration: (text) => /^P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)$/.test(text),
  email,
  hostname: host,
  ipv4: (text) => IPV4.test(text),
  ipv6,
  uuid: (text) => /^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/i.test(text),
  uri: (text) => /^[a-z][a-z\d+.-]*:[^\s<>"{}|\\^`]*$/i.test(text) && URL.canParse(text),
};

export function hasFormat(text, format) {
  return !Object.hasOwn(KNOWN, format) || KNOWN[format](text);
}
