/* Sums per key: open addressing, the keys' bytes and their sums in chunks that never move.

       a row:   column 0 │ column 1 │ … │ count, size, key … │ up to 3 bytes

   A table is split by hash into shards, so that growing one holds nobody up for long. Keys are hashed with a secret
   (SipHash-1-3): whoever chooses them cannot choose where they go. */

#ifndef FOLD_TABLE_H
#define FOLD_TABLE_H

#include <stddef.h>
#include <stdint.h>

#define SHARDS 64
#define MAX_COLUMNS 8

typedef struct {
    uint64_t secret[2];
} hash_key;

uint64_t hash_bytes(const hash_key *key, const uint8_t *at, size_t size);

/* Rows begin at every fourth byte: padding to eight would cost two bytes of each. */
#ifdef __GNUC__
#define ROW_BITS 2
typedef uint64_t table_sum __attribute__((aligned(4)));
#else
#define ROW_BITS 3
typedef uint64_t table_sum;
#endif

/* What a row ends with; its sums, the table's columns, lie before. */
typedef struct {
    uint32_t count; /* how often it was added to */
    uint16_t size; /* of the key */
    uint8_t key[];
} table_row;

#define ROW_HEAD offsetof(table_row, key)
#define MAX_KEY 4096

typedef struct {
    uint32_t hash;
    uint32_t ref; /* 0: empty */
} table_slot;

typedef struct {
    table_slot *slots;
    uint32_t mask;
    uint32_t used;
} table_shard;

typedef struct {
    table_shard shards[SHARDS];
    uint8_t **chunks;
    uint32_t chunk_count;
    uint32_t chunk_room; /* pointers that fit into `chunks` */
    size_t filled; /* bytes of the last chunk */
    size_t held; /* bytes of all rows */
    uint32_t rows;
    unsigned columns;
} table;

table *table_new(unsigned columns);
void table_free(table *self);

/* The row of a key, of MAX_KEY bytes at most, with sums of 0 if it is new. NULL: no memory. */
table_row *table_find(table *self, const hash_key *secret, const uint8_t *key, size_t size);

/* The bytes that the table takes from the system. */
size_t table_allocated(const table *self);

static inline table_sum *table_sums(const table *self, const table_row *row)
{
    return (table_sum *)row - self->columns;
}

/* Rows one after the other, once: `*chunk` and `*at` begin as 0. NULL at the end. A row is there until the next call,
   and its memory is given back on the way: to free all of a large table at its end takes long. */
const table_row *table_next(table *self, uint32_t *chunk, size_t *at);

#endif
