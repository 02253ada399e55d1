/* The walker: a plan, the sources of rows, and the table that it adds to. */

#ifndef FOLD_WALKER_H
#define FOLD_WALKER_H

#include "module.h"
#include "table.h"

#define QUANTITIES 8
#define MAX_TYPES 64
#define MAX_SOURCES UINT16_MAX
#define KEY_HEAD 7 /* of a key: window, source, and rule with whether there is a route; then the texts */
#define MAX_TESTS 64
#define MAX_FATES 192
#define SAME 0xff /* instead of a length in a key: the text is the rule's value */
#define LONG 0xf0 /* the length follows in two bytes */

/* How rows of a type are treated; above: the number of the fate that skips them, and FIRST_SKIP. */
enum { CAREFUL, HTTP_END, TCP_END, HTTP_END_UNTYPED, TCP_END_UNTYPED, FIRST_SKIP };

/* Fates that are not in the list that Python gives. */
enum { COUNTED, INTERNAL_REDIRECT, FIRST_NAMED };

enum { NO_START_TIME, FUTURE, PAST_HORIZON, NOTES };

typedef struct {
    int number; /* of the fate that skips a row */
    PyObject *statuses; /* a frozenset of ints, or NULL */
    uint32_t flags; /* any of these */
    uint16_t methods; /* any of these */
    int details; /* the question that is asked about the text; -1: none */
    int route;
    int wants_flags;
} skip_test;

typedef struct {
    uint8_t handling[2][MAX_TYPES]; /* of TCP rows, of HTTP rows */
    PyObject *constants; /* a tuple of bytes, by number of the wanted field */
    uint64_t tests;
    uint64_t ended; /* end rows of HTTP streams, of any fate; those left to who is careful are counted there */
} source;

typedef struct {
    uint64_t first;
    uint64_t second; /* its lowest bit is the answer */
} verdict;

typedef struct {
    PyObject_HEAD
    /* the plan */
    wanted_fields wants;
    PyObject *keys; /* what `wants` points into */
    unsigned rules, dimensions, columns;
    uint8_t rule_fields[MAX_FIELDS], dimension_fields[MAX_FIELDS], column_of[QUANTITIES];
    uint32_t plain; /* rules that take any text, a bit each */
    PyObject *judge;
    skip_test tests[MAX_TESTS];
    unsigned test_count;
    uint64_t window_ms, skew_ms, horizon_ms, finished_below_ns;
    hash_key secrets[3];
    /* what was folded since the last take */
    source *sources;
    uint32_t source_count, source_room;
    table *sums;
    uint64_t fates[MAX_FATES];
    uint64_t notes[NOTES];
    /* answers of `judge` */
    verdict *verdicts;
    uint32_t verdict_count, verdict_mask;
} walker;

/* Rows that a walker gave away. */
typedef struct {
    PyObject_HEAD
    table *sums;
    unsigned dimensions;
    uint64_t window_ms;
    uint32_t chunk;
    size_t at;
    uint32_t left;
} rows;

/* Whether `judge(question, text)` is true: 1, 0, or -1 with an exception. */
int ask(walker *self, unsigned question, span text);

/* Folds a row: 1 done, 0 left to who is careful, -1 with an exception. */
int fold_row(walker *self, source *from, span raw, int http, uint64_t now_ms);

#endif
