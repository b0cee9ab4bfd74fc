#include "guest.h"

/* The entry point (PVH: 32 bit, no paging, %ebx has the start info), named by a note. */
__asm__(".pushsection .note.Xen, \"a\", @note\n"
	".long 4, 4, 18\n" /* XEN_ELFNOTE_PHYS32_ENTRY */
	".asciz \"Xen\"\n"
	".long entry\n"
	".popsection\n"
	".globl entry\n"
	"entry: cld\n"
	"mov $stack + 16384, %esp\n"
	"push %ebx\n"
	"call start\n");
u8 stack[16384] __attribute__((aligned(16)));
u8 hypercalls[4096] __attribute__((aligned(4096)));
u8 shared[4096] __attribute__((aligned(4096)));

volatile struct store_page *store;
u32 store_port;
static volatile struct console_page *console;
static u32 console_port, tsc_mhz;

enum { MEMORY_OP = 12, SCHED_OP = 29, EVENT_CHANNEL_OP = 32, HVM_OP = 34 };
enum { PARAM_STORE_PFN = 1, PARAM_STORE_EVTCHN = 2, PARAM_CONSOLE_PFN = 17, PARAM_CONSOLE_EVTCHN = 18 };
enum { DOMID_SELF = 0x7ff0 };

static int hypercall(u32 call, u32 a, void *b)
{
	int result;
	u32 first = a, second = (u32)b;
	__asm__ volatile("call *%3"
			 : "=a"(result), "+b"(first), "+c"(second)
			 : "r"(hypercalls + call * 32)
			 : "edx", "esi", "memory", "cc");
	return result;
}

static void cpuid(u32 leaf, u32 sub, u32 out[4])
{
	__asm__ volatile("cpuid"
			 : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
			 : "a"(leaf), "c"(sub));
}

static u32 param(u32 index)
{
	struct { u32 domid, index; u64 value; } arg = { DOMID_SELF, index, 0 };
	return hypercall(HVM_OP, 1, &arg) ? 0 : (u32)arg.value;
}

static void send(u32 port)
{
	hypercall(EVENT_CHANNEL_OP, 4, &port);
}

void kick(void)
{
	fence();
	send(store_port);
}

void wait_event(void)
{
	/* Pending bits begin at 2048, one word for each 32 ports. */
	volatile u32 *pending = (volatile u32 *)(shared + 2048) + store_port / 32;
	u32 bit = 1u << store_port % 32;
	struct { u32 *ports; u32 count; u64 until; } poll = { &store_port, 1, 0 };
	if (!(*pending & bit))
		hypercall(SCHED_OP, 3, &poll);
	__asm__ volatile("lock andl %1, %0" : "+m"(*pending) : "r"(~bit) : "memory");
}

void say(const char *words)
{
	for (; *words; words++) {
		if (console->out_prod - console->out_cons < 2048)
			console->out[console->out_prod++ % 2048] = *words;
	}
	fence();
	send(console_port);
}

void power_off(void)
{
	u32 reason = 0;
	for (;;)
		hypercall(SCHED_OP, 2, &reason);
}

u32 now_us(void)
{
	static u64 first;
	u32 low, high, quotient, rest;
	u64 ticks;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	ticks = ((u64)high << 32) | low;
	if (!first)
		first = ticks;
	ticks -= first;
	/* Without a library for 64-bit division; one hour fits. */
	__asm__("divl %4"
		: "=a"(quotient), "=d"(rest)
		: "a"((u32)ticks), "d"((u32)(ticks >> 32)), "r"(tsc_mhz));
	return quotient;
}

u32 any(void)
{
	static u32 state = 2463534242u;
	state ^= state << 13;
	state ^= state >> 17;
	state ^= state << 5;
	return state;
}

void fence(void)
{
	__asm__ volatile("lock addl $0, (%%esp)" : : : "memory", "cc");
}

u32 length(const char *words)
{
	u32 count = 0;
	while (words[count])
		count++;
	return count;
}

void copy(void *to, const void *from, u32 count)
{
	while (count--)
		((u8 *)to)[count] = ((const u8 *)from)[count];
}

int same(const void *a, const void *b, u32 count)
{
	while (count--)
		if (((const u8 *)a)[count] != ((const u8 *)b)[count])
			return 0;
	return 1;
}

char *number(char *end, u32 value)
{
	char digits[10];
	int count = 0;
	do {
		digits[count++] = '0' + value % 10;
	} while (value /= 10);
	while (count)
		*end++ = digits[--count];
	*end = 0;
	return end;
}

char *text(char *end, const char *more)
{
	copy(end, more, length(more) + 1);
	return end + length(more);
}

void start(u32 info)
{
	u32 regs[4];
	struct { uint16_t domid, size; u32 space, index, gfn; } map = { DOMID_SELF, 0, 0, 0, (u32)shared >> 12 };
	cpuid(0x40000003, 0, regs);
	tsc_mhz = regs[2] / 1000;
	cpuid(0x40000002, 0, regs);
	__asm__ volatile("wrmsr" : : "c"(regs[1]), "a"((u32)hypercalls), "d"(0));
	hypercall(MEMORY_OP, 7, &map);
	store = (void *)(param(PARAM_STORE_PFN) << 12);
	store_port = param(PARAM_STORE_EVTCHN);
	console = (void *)(param(PARAM_CONSOLE_PFN) << 12);
	console_port = param(PARAM_CONSOLE_EVTCHN);
	/* struct hvm_start_info: the command line's address is at 24. */
	guest_main(*(const char **)(info + 24));
	power_off();
}
