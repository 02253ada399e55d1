/* One row of the access log, read as far as a finished stream needs it. */

#ifndef FOLD_ROW_H
#define FOLD_ROW_H

#include "wire.h"

#define MAX_FIELDS 32
#define MAX_PATH 8

typedef enum { FROM_TAG, FROM_HEADER, FROM_METADATA, FROM_ROUTE, FROM_AUTHORITY, FROM_SNI, FROM_SOURCE } field_kind;

/* A field that a rule or a dimension reads. */
typedef struct {
    field_kind kind;
    unsigned depth; /* of `path` */
    span path[MAX_PATH]; /* keys as a map's entry begins with them: tag, length, text */
} wanted;

/* Those of the fields that are read from entries of one map, and how their keys go on behind the tag: most entries
   are told apart by that. */
typedef struct {
    unsigned count;
    uint16_t heads[MAX_FIELDS];
    uint8_t numbers[MAX_FIELDS];
} wanted_keys;

typedef struct {
    unsigned count;
    wanted fields[MAX_FIELDS];
    /* what follows from these: see prepare_fields */
    wanted_keys tags, headers;
    int constants; /* whether there are fields that come from the source */
} wanted_fields;

/* Fills in what follows from the fields. Keys have three bytes at least: tag, length and a letter. */
void prepare_fields(wanted_fields *wants);

typedef struct {
    uint64_t type;
    uint64_t intermediate;
    uint64_t wire_in, wire_out;
    uint64_t body_in, body_out; /* of an HTTP row; what a TCP row received and sent */
    uint64_t start_s, start_ns;
    uint64_t open_s, open_ns;
    int has_duration;
    uint64_t method, status;
    uint32_t flags; /* a bit for each response flag that is set, by field number */
    span route, cluster, sni, authority, details, metadata;
    span values[MAX_FIELDS]; /* of the wanted fields; `at` is NULL where absent */
} row;

/* Returns 0 where the row is odd: then nothing of `found` may be used. */
int read_http(span raw, const wanted_fields *wants, row *found);
int read_tcp(span raw, const wanted_fields *wants, row *found);

#endif
