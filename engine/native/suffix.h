// The suffix drafter: what engine/speculation/suffix.py does, in microseconds. A text is a ring of tokens; per level a
// hash table finds the newest place behind the same 4, 2 or 1 tokens, and links lead from it to older ones. What leaves
// the ring leaves the tables, so memory is bounded by the capacity, and grows with what is really there.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "sampler.h"

static const int LEVELS = 3, GRAM[LEVELS] = {4, 2, 1};
static const int WALK = 16, REACH = 32, LONGEST = 64;
// As in the reference, which says what they are.
static const double ESCAPE = 0.5, CONFIRMED = 4, PRESENT = 4;
static const int32_t SEPARATOR = -1;
static const uint32_t LEAST_ROOM = 256;

// In a table: the newest place of one gram, named by the slot of the gram's last token; -1 is empty.
struct Entry {
    uint32_t hash;
    int32_t slot;
};

struct Table {
    Entry *entries;
    int32_t *back;   // per slot: how many tokens before this place the next older one is; 0 none
    uint32_t bits, used;
};

struct Suffix {
    int32_t *tokens;
    Table tables[LEVELS];
    int64_t end;        // tokens ever added; position p is the place before token p
    uint32_t capacity;  // most tokens kept
    uint32_t room;      // allocated, at most capacity
    uint32_t head;      // slot of position `end`
    uint64_t secret;    // hashes nobody can foresee: prompts are not ours
};

struct SuffixRow {
    Suffix *own;
    const Suffix *corpus;  // null: none
    Draw draw;             // its key; temperature 0: greedy
    int32_t most, fresh;   // tokens wanted; tokens to add to `own` first
    int32_t drawn, unused; // whether the noise takes part in the votes
};

static int64_t oldest(const Suffix &s) { return s.end > s.room ? s.end - s.room : 0; }
// The slot of a position that is in the ring (or of `end`).
static uint32_t slot_of(const Suffix &s, int64_t position) {
    uint32_t distance = (uint32_t)(s.end - position);
    return distance <= s.head ? s.head - distance : s.head + s.capacity - distance;
}
static int32_t token_at(const Suffix &s, int64_t position) { return s.tokens[slot_of(s, position)]; }

static uint32_t gram_hash(const Suffix &s, const int32_t *gram, int size) {
    uint64_t x = s.secret;
    for (int i = 0; i < size; i++) x = (x ^ (uint32_t)gram[i]) * GOLDEN, x ^= x >> 32;
    return (uint32_t)((x * 0xBF58476D1CE4E5B9ull) >> 32);
}

// The index of this hash's entry, or of the empty one where it would be.
static uint32_t probe(const Table &t, uint32_t hash) {
    uint32_t mask = (1u << t.bits) - 1, i = hash >> (32 - t.bits);
    while (t.entries[i].slot >= 0 && t.entries[i].hash != hash) i = (i + 1) & mask;
    return i;
}

// Twice as many entries; false where there is no memory for them.
static bool widen(Table &t) {
    Table wide = t;
    wide.bits++;
    wide.entries = (Entry *)malloc(sizeof(Entry) << wide.bits);
    if (!wide.entries) return false;
    memset(wide.entries, 0xFF, sizeof(Entry) << wide.bits);
    for (uint32_t i = 0; i < 1u << t.bits; i++)
        if (t.entries[i].slot >= 0) wide.entries[probe(wide, t.entries[i].hash)] = t.entries[i];
    free(t.entries);
    t = wide;
    return true;
}

// The gram whose last token is at `position` was just completed.
static void enter(Suffix &s, Table &t, uint32_t hash, int64_t position) {
    int32_t slot = (int32_t)slot_of(s, position);
    t.back[slot] = 0;
    uint32_t i = probe(t, hash);
    if (t.entries[i].slot >= 0) {
        uint32_t newest = (uint32_t)t.entries[i].slot;
        t.back[slot] = (int32_t)((uint32_t)slot > newest ? slot - newest : slot + s.capacity - newest);
    } else {
        // Without room to grow the last entries stay empty, so that every probe ends; the gram is then not found.
        if (2 * (t.used + 1) > 1u << t.bits) {
            if (widen(t)) i = probe(t, hash);
            else if (8 * (uint64_t)(t.used + 1) > 7ull << t.bits) return;
        }
        t.used++;
    }
    t.entries[i] = {hash, slot};
}

// The gram whose last token is in `slot` leaves the ring; where it was the newest of its kind, so does its entry.
static void leave(Table &t, uint32_t hash, uint32_t slot) {
    uint32_t mask = (1u << t.bits) - 1, hole = probe(t, hash);
    if (t.entries[hole].slot != (int32_t)slot) return;
    t.used--;
    for (uint32_t i = (hole + 1) & mask; t.entries[i].slot >= 0; i = (i + 1) & mask) {
        uint32_t home = t.entries[i].hash >> (32 - t.bits);
        // What probes from its home to `i` and passes the hole moves into it.
        if (((i - home) & mask) >= ((i - hole) & mask)) t.entries[hole] = t.entries[i], hole = i;
    }
    t.entries[hole].slot = -1;
}

// The gram of `size` tokens from `position` on, if all of it is there and one text's.
static bool gram_at(const Suffix &s, int64_t position, int size, int32_t *gram) {
    if (position < oldest(s) || position + size > s.end) return false;
    for (int i = 0; i < size; i++)
        if ((gram[i] = token_at(s, position + i)) == SEPARATOR) return false;
    return true;
}

static bool reallot(int32_t *&array, uint32_t count) {
    int32_t *grown = (int32_t *)realloc(array, count * sizeof(int32_t));
    if (grown) array = grown;
    return grown != nullptr;
}

// Room for one more token: more memory, or the oldest token's.
static void make_room(Suffix &s) {
    if (s.room < s.capacity && s.end == s.room) {
        uint32_t room = s.room > s.capacity / 2 ? s.capacity : 2 * s.room;
        bool fine = reallot(s.tokens, room);
        for (int level = 0; level < LEVELS; level++) fine = fine && reallot(s.tables[level].back, room);
        if (fine) s.room = room;
        else s.capacity = s.room;
    }
    if (s.head == s.capacity) s.head = 0;
    if (s.end < s.capacity) return;
    int32_t gram[4];
    for (int level = 0; level < LEVELS; level++)
        if (gram_at(s, s.end - s.capacity, GRAM[level], gram))
            leave(s.tables[level], gram_hash(s, gram, GRAM[level]),
                  slot_of(s, s.end - s.capacity + GRAM[level] - 1));
}

static void append(Suffix &s, int32_t token) {
    make_room(s);
    s.tokens[s.head++] = token;
    s.end++;
    int32_t gram[4];
    for (int level = 0; level < LEVELS; level++)
        if (gram_at(s, s.end - GRAM[level], GRAM[level], gram))
            enter(s, s.tables[level], gram_hash(s, gram, GRAM[level]), s.end - 1);
}

// A place that agrees with the draft so far: the token at `position` is its vote.
struct Voter {
    int64_t position;
    int32_t length;
};

struct Voters {
    const Suffix *text;
    Voter voters[WALK];
    int count;
};

// How many of `context`'s last tokens stand before a position.
static int matched(const Suffix &s, int64_t position, const int32_t *context, int count) {
    int64_t most = position - oldest(s);
    if (most > count) most = count;
    uint32_t slot = slot_of(s, position);
    int length = 0;
    for (; length < most; length++) {
        slot = slot ? slot - 1 : s.capacity - 1;
        if (s.tokens[slot] != context[count - 1 - length]) break;
    }
    return length;
}

// The newest places behind the longest gram of the context's end that the text knows.
static void search(Voters &found, const int32_t *context, int count) {
    const Suffix &s = *found.text;
    found.count = 0;
    if (count > REACH) context += count - REACH, count = REACH;
    for (int level = 0; level < LEVELS && !found.count; level++) {
        int size = GRAM[level];
        if (count < size) continue;
        const Table &t = s.tables[level];
        int32_t slot = t.entries[probe(t, gram_hash(s, context + count - size, size))].slot;
        if (slot < 0) continue;
        int64_t last = s.end - (s.head > (uint32_t)slot ? s.head - slot : s.head + s.capacity - slot);
        int64_t first = oldest(s) + size - 1;
        for (int seen = 0; seen <= WALK && found.count < WALK && last >= first; seen++) {
            int32_t back = t.back[slot_of(s, last)];
            if (last + 1 < s.end && token_at(s, last + 1) != SEPARATOR) {
                int length = matched(s, last + 1, context, count);
                if (length >= size) found.voters[found.count++] = {last + 1, length};
            }
            if (!back) break;
            last -= back;
        }
    }
}

// What is voted on: tokens in the order in which they were first named.
struct Ballot {
    int32_t tokens[2 * WALK];
    int64_t weights[2 * WALK];
    double votes[2 * WALK];
    int count;
};

// Adds the voters' weights, the squares of their matches' lengths; returns the sum. Votes of new tokens are 0.
static int64_t tally(Ballot &ballot, const Voters &from) {
    int64_t total = 0;
    for (int i = 0; i < ballot.count; i++) ballot.weights[i] = 0;
    for (int i = 0; i < from.count; i++) {
        int32_t token = token_at(*from.text, from.voters[i].position);
        int64_t weight = (int64_t)from.voters[i].length * from.voters[i].length;
        int k = 0;
        while (k < ballot.count && ballot.tokens[k] != token) k++;
        if (k == ballot.count) ballot.tokens[k] = token, ballot.weights[k] = 0, ballot.votes[k] = 0, ballot.count++;
        ballot.weights[k] += weight;
        total += weight;
    }
    return total;
}

static bool knows(const Suffix &s, const int32_t *gram, int level) {
    const Table &t = s.tables[level];
    return t.entries[probe(t, gram_hash(s, gram, GRAM[level]))].slot >= 0;
}

static double trust(int own, int corpus) {
    if (corpus < 2 && own >= 2) return 0.6;
    return own < 2 ? 0.3 : own < 4 ? 0.4 : own < 8 ? 0.5 : 0.6;
}
static int longest(const Voters &voters) {
    int length = 0;
    for (int i = 0; i < voters.count; i++) length = voters.voters[i].length > length ? voters.voters[i].length : length;
    return length;
}

// Every candidate's votes; returns the votes nobody has. No sum follows a product: fused, it would be rounded otherwise
// than in the reference.
static double vote(Ballot &ballot, const Voters &own, const Voters &corpus, const int32_t *context, int count) {
    ballot.count = 0;
    double share = !corpus.count ? 1 : !own.count ? 0 : trust(longest(own), longest(corpus));
    int64_t total = tally(ballot, own);
    for (int k = 0, named = ballot.count; k < named; k++) {
        ballot.votes[k] = share * ballot.weights[k] / total;
        int32_t gram[4] = {0, 0, 0, ballot.tokens[k]};
        if (!corpus.count || count < 3) continue;
        memcpy(gram, context + count - 3, 3 * sizeof(int32_t));
        if (knows(*corpus.text, gram, 0)) ballot.votes[k] += CONFIRMED * ballot.weights[k] / total;
    }
    if (!corpus.count) return corpus.text ? ESCAPE : 0;
    double rest = 1 - share, faith = rest * corpus.count / (corpus.count + ESCAPE);
    total = tally(ballot, corpus);
    for (int k = 0; k < ballot.count; k++) {
        if (!ballot.weights[k]) continue;
        double present = knows(*own.text, ballot.tokens + k, 2) ? PRESENT : 1;
        ballot.votes[k] += faith * ballot.weights[k] * present / total;
    }
    return rest * ESCAPE / (corpus.count + ESCAPE);
}

// The index of the candidate with the most votes, `share` its share. For rows that are drawn each is divided by the
// verifier's own exponential variate, which is adding its Gumbel noise to the votes' logarithm. `rivals`: who wins
// without the noise, and with it; only asked for where a row has a temperature.
static int elect(Ballot &ballot, const SuffixRow &row, int drafted, double rest, double *share, int32_t *rivals) {
    Draw at = row.draw;
    at.position += drafted;
    const uint64_t key = row.drawn || rivals ? row_key(at) : 0;
    double sum = 0, drawn_sum = 0, best = 0, drawn_best = 0;
    int winner = 0, drawn_winner = 0;
    for (int k = 0; k < ballot.count; k++) {
        double vote = ballot.votes[k];
        sum += vote;
        if (vote > best) best = vote, winner = k;
        if (!row.drawn && !rivals) continue;
        uint32_t bits = (uint32_t)finalise(finalise(key + (uint64_t)ballot.tokens[k] * GOLDEN));
        vote /= -log((bits + 0.5) * 0x1p-32);
        drawn_sum += vote;
        if (vote > drawn_best) drawn_best = vote, drawn_winner = k;
    }
    if (rivals) rivals[0] = ballot.tokens[winner], rivals[1] = ballot.tokens[drawn_winner];
    *share = row.drawn ? drawn_best / (drawn_sum + rest) : best / (sum + rest);
    return row.drawn ? drawn_winner : winner;
}

// Keeps the voters that voted for `token` and have more to say; returns how many voted for it.
static int follow(Voters &from, int32_t token) {
    int kept = 0, agreed = 0;
    for (int i = 0; i < from.count; i++) {
        Voter voter = from.voters[i];
        if (token_at(*from.text, voter.position) != token) continue;
        agreed++;
        voter.length++;
        if (++voter.position < from.text->end && token_at(*from.text, voter.position) != SEPARATOR)
            from.voters[kept++] = voter;
    }
    from.count = kept;
    return agreed;
}

static int draft(const SuffixRow &row, int32_t *tokens, double *shares, int32_t *match, int32_t *rivals) {
    const Suffix &s = *row.own;
    int32_t context[REACH + LONGEST];
    int count = 0, drafted = 0;
    for (int64_t p = s.end - oldest(s) > REACH ? s.end - REACH : oldest(s); p < s.end; p++) context[count++] = token_at(s, p);
    Voters own = {&s, {}, 0}, corpus = {row.corpus, {}, 0};
    Ballot ballot;
    *match = 0, rivals[0] = rivals[1] = -1;
    while (drafted < row.most && drafted < LONGEST) {
        if (!own.count) search(own, context, count);
        if (!corpus.count && corpus.text) search(corpus, context, count);
        if (!own.count && !corpus.count) break;
        if (!drafted) *match = longest(own) > longest(corpus) ? longest(own) : longest(corpus);
        double rest = vote(ballot, own, corpus, context, count);
        int32_t *asked = !drafted && row.draw.temperature > 0 ? rivals : nullptr;
        int32_t token = ballot.tokens[elect(ballot, row, drafted, rest, shares + drafted, asked)];
        tokens[drafted++] = context[count++] = token;
        follow(own, token);
        // Past the end of every answer that agrees there is nothing to draft.
        if (follow(corpus, token) && !corpus.count) break;
    }
    return drafted;
}

extern "C" {
void whet_suffix_close(Suffix *s) {
    if (!s) return;
    free(s->tokens);
    for (Table &t : s->tables) free(t.entries), free(t.back);
    free(s);
}

// An empty text of at most `capacity` tokens; null: no memory.
Suffix *whet_suffix_open(int64_t capacity, uint64_t secret) {
    Suffix *s = (Suffix *)calloc(1, sizeof(Suffix));
    if (!s) return nullptr;
    s->capacity = (uint32_t)capacity, s->secret = secret;
    s->room = s->capacity < LEAST_ROOM ? s->capacity : LEAST_ROOM;
    bool fine = reallot(s->tokens, s->room);
    for (int level = 0; level < LEVELS; level++) {
        Table &t = s->tables[level];
        fine = fine && reallot(t.back, s->room) && (t.entries = (Entry *)malloc(sizeof(Entry) * LEAST_ROOM));
        if (fine) memset(t.entries, 0xFF, sizeof(Entry) * LEAST_ROOM), t.bits = 8;
    }
    if (fine) return s;
    whet_suffix_close(s);
    return nullptr;
}

void whet_suffix_extend(Suffix *s, const int32_t *tokens, int count) {
    for (int i = 0; i < count; i++) append(*s, tokens[i]);
}

int64_t whet_suffix_tokens(const Suffix *s) { return s->end - oldest(*s); }

int64_t whet_suffix_bytes(const Suffix *s) {
    int64_t bytes = sizeof(Suffix) + (1 + LEVELS) * (int64_t)s->room * sizeof(int32_t);
    for (int level = 0; level < LEVELS; level++) bytes += (int64_t)sizeof(Entry) << s->tables[level].bits;
    return bytes;
}

// One draft per row: tokens and shares one row's after the other's, how many each has, the length of the match, and two
// rivals (-1: none).
void whet_suffix_propose(const SuffixRow *rows, int count, const int32_t *fresh, int32_t *tokens, double *shares,
                         int32_t *drafted, int32_t *matches, int32_t *rivals) {
    for (int i = 0; i < count; i++) {
        whet_suffix_extend(rows[i].own, fresh, rows[i].fresh);
        fresh += rows[i].fresh;
        drafted[i] = draft(rows[i], tokens, shares, matches + i, rivals + 2 * i);
        tokens += drafted[i], shares += drafted[i];
    }
}
}
