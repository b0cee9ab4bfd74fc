/* A client that follows the protocol, and attacks that violate it. */
#ifndef CLIENT_H
#define CLIENT_H

#include "guest.h"

enum { DIRECTORY = 1, READ = 2, WATCH = 4, WRITE = 11, ERROR = 16 };

struct header { u32 type, req_id, tx_id, len; };

/* Sends a request and waits for its reply. Returns the type; stores the payload, cut to `size` bytes,
 * and its length. */
u32 ask(u32 type, const void *payload, u32 len, void *answer, u32 size, u32 *answer_len);
/* Sends a WRITE. Returns true if it succeeded. */
int write_node(const char *path, const char *value);
/* Sends a READ. Returns true if the value is this one. */
int node_is(const char *path, const char *value);
/* Saves the features that the daemon offers, before they are overwritten. */
void look_at_features(void);
/* Returns true if the daemon offers reconnection. */
int can_start_anew(void);
/* Requests a reconnection and waits for it, if it is offered. The page may have any contents. */
void start_anew(void);

struct attack {
	const char *name;
	/* Runs the attack for a few milliseconds. */
	void (*burst)(void);
};
/* The last entry has no name. */
extern const struct attack attacks[];

#endif
