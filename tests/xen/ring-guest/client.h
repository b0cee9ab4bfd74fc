/* A client that keeps to the protocol, and attacks that do not. */
#ifndef CLIENT_H
#define CLIENT_H

#include "guest.h"

enum { DIRECTORY = 1, READ = 2, WATCH = 4, WRITE = 11, ERROR = 16 };

struct header { u32 type, req_id, tx_id, len; };

/* Asks, and waits for the answer: its type; its payload, cut to `size` bytes, and its length. */
u32 ask(u32 type, const void *payload, u32 len, void *answer, u32 size, u32 *answer_len);
/* WRITE; was it done? */
int write_node(const char *path, const char *value);
/* READ; is this the value? */
int node_is(const char *path, const char *value);
/* Remembers what the daemon offers, before that is overwritten. */
void look_at_features(void);
/* Does it offer a fresh connection? */
int can_start_anew(void);
/* Asks for one and waits for it, if it is offered. Anything may be in the page. */
void start_anew(void);

struct attack {
	const char *name;
	/* A few milliseconds of it. */
	void (*burst)(void);
};
/* Ends with one without a name. */
extern const struct attack attacks[];

#endif
