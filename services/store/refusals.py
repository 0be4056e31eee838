"""Does an answer decline to answer? One list of phrases, for the gate's report, the shadow and the canary's counts."""

import re

# A refusal shows in how an answer begins.
READ = 200
_CANNOT = (
    r"((i|we) ?)?(can(no|['’])t|can not|won['’]t|will not|((am|are|['’]?m|['’]?re) )?(unable|not able) to) "
    r"(help|assist|do|provide|answer|comply|fulfil|give|share|discuss)"
)
# Support desks say that they are sorry and help all the same, so "sorry" takes a "but" at once or a "cannot" soon.
# Both Postgres and Python search with it, without case, so it keeps to what means the same to both: no \b, no \y.
REFUSAL = (
    r"^\W*("
    r"(((i['’]?m|i am|we['’]?re|we are) )?((very|really|so|truly) )?(sorry|afraid)|(i|we) apologi[sz]e)"
    rf"(,? but |[^.!?]*[.!?]?[^.!?]*\W{_CANNOT})"
    rf"|((unfortunately|sadly),? )?{_CANNOT}"
    r"|as an ai(\W|$))"
)
_REFUSES = re.compile(REFUSAL, re.IGNORECASE)


def refuses(output: str) -> bool:
    """Whether it begins as refusals do."""
    return _REFUSES.search(output[:READ]) is not None
