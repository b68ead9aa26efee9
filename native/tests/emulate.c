// What of Linux a static program without threads needs, on a bare CPU. emulate.py lays it into the read-only memory of
// an emulator beside the program.
typedef unsigned char Byte;
typedef unsigned long Word;

// What emulate.py chose, in its order; the assembly below reads it too.
static const volatile struct {
  Word tables, entry, stack, heap, mappings, end;
} *const given = (void *)0x7000;

__asm__(
    // Where the CPU starts, at the end of 4 GiB. From 0xffe00000 on lie pieces of the other memory: where to, how many
    // words of 4 bytes, the words. Copies them; one of no words is where to go on.
    ".section .reset, \"ax\"\n"
    "flat: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff\n"
    "flat_segments: .word 23; .long flat\n"
    ".code16\n"
    "start:\n"
    "  lgdtl %cs:0xff80 + flat_segments - flat\n"
    "  movl %cr0, %eax\n"
    "  orb $1, %al\n"
    "  movl %eax, %cr0\n"
    "  ljmpl $8, $copy\n"
    ".code32\n"
    "copy:\n"
    "  movl $16, %eax\n"
    "  movl %eax, %ds\n"
    "  movl %eax, %es\n"
    "  movl $0xffe00000, %esi\n"
    "again:\n"
    "  lodsl\n"
    "  movl %eax, %edi\n"
    "  lodsl\n"
    "  movl %eax, %ecx\n"
    "  jecxz copied\n"
    "  rep movsl\n"
    "  jmp again\n"
    "copied:\n"
    "  jmp *%edi\n"
    ".org 0x70\n"
    ".code16\n"
    "  jmp start\n"
    ".org 0x80\n"

    // From there to the program's first instruction.
    ".text\n"
    ".code32\n"
    ".globl _start\n"
    "_start:\n"
    "  lgdt segments\n"
    "  movl $0x40620, %eax\n"  // CR4: addresses of 64 bits, SSE, extended states
    "  movl %eax, %cr4\n"
    "  movl 0x7000, %eax\n"
    "  movl %eax, %cr3\n"
    "  movl $0xc0000080, %ecx\n"  // EFER: system calls, long mode
    "  movl $0x101, %eax\n"
    "  xorl %edx, %edx\n"
    "  wrmsr\n"
    "  movl $0x80010033, %eax\n"  // CR0: pages, write protection, x87, protected mode
    "  movl %eax, %cr0\n"
    "  ljmp $8, $wide\n"
    ".code64\n"
    "wide:\n"
    "  movl $16, %eax\n"
    "  movl %eax, %ss\n"
    "  lidt exceptions\n"
    "  movl $48, %eax\n"
    "  ltr %ax\n"
    "  xorl %ecx, %ecx\n"
    "  movl $0x600e7, %eax\n"  // states: x87, SSE, AVX, AVX-512, tile configuration and data
    "  xorl %edx, %edx\n"
    "  xsetbv\n"
    "  movl $0xc0000081, %ecx\n"  // STAR: the segments of system and program
    "  xorl %eax, %eax\n"
    "  movl $0x00180008, %edx\n"
    "  wrmsr\n"
    "  incl %ecx\n"  // LSTAR: where system calls come in
    "  movl $called, %eax\n"
    "  xorl %edx, %edx\n"
    "  wrmsr\n"
    "  fninit\n"
    "  xorl %eax, %eax\n"  // a zero in front of what the program prints, another behind it
    "  outb %al, $0xe9\n"
    "  movq 0x7008, %rcx\n"
    "  movq 0x7010, %rsp\n"
    "  movl $2, %r11d\n"
    "  sysretq\n"
    "called:\n"
    "  movq %rsp, programs_stack\n"
    "  movl $0x7000, %esp\n"
    "  push %rcx; push %r11; push %rdi; push %rsi; push %rdx; push %r8; push %r9; push %r10\n"
    "  movq %r10, %rcx\n"
    "  movq %rax, %r8\n"
    "  call answer\n"
    "  pop %r10; pop %r9; pop %r8; pop %rdx; pop %rsi; pop %rdi; pop %r11; pop %rcx\n"
    "  movq programs_stack, %rsp\n"
    "  sysretq\n"

    // Exceptions end the program.
    "raised:\n"
    "  pop %rdi\n"
    "  movq %rsp, %rsi\n"
    "  andq $-16, %rsp\n"
    "  call end_at_exception\n"
    ".balign 8\n"
    "gates: .set i, 0; .rept 32; .balign 8; push $i; jmp raised; .set i, i + 1; .endr\n"
    ".balign 8\n"
    "exception_table: .set i, 0; .rept 32; .word gates + 8 * i, 8, 0x8e00, 0, 0, 0, 0, 0; .set i, i + 1; .endr\n"
    "exceptions: .word 511; .quad exception_table\n"
    ".balign 8\n"
    "programs_stack: .quad 0\n"
    "task: .long 0; .quad 0x7000; .zero 92\n"
    "table: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0x00cff3000000ffff, 0x00affb000000ffff\n"
    "  .word 103, task, 0x8900, 0, 0, 0, 0, 0\n"
    "segments: .word 63; .quad table\n");

static void out(unsigned port, Byte value) { __asm__ volatile("outb %0, %w1" ::"a"(value), "Nd"(port)); }

static Word print(const Byte *from, Word count) {
  for (Word i = 0; i < count; ++i) out(0xe9, from[i]);
  return count;
}

static _Noreturn void leave(Byte status) {
  out(0xe9, 0);
  out(0xe9, status);
  for (;;) {
    for (const char *at = "Shutdown"; *at; ++at) out(0x8900, (Byte)*at);
  }
}

static void print_number(Word number) {
  for (int shift = 28; shift >= 0; shift -= 4) {
    const Byte digit = number >> shift & 15;
    out(0xe9, digit < 10 ? '0' + digit : 'a' + digit - 10);
  }
}

// 6: no such instruction, or not in this state; 13: not allowed; 14: no such memory. Some come with an error code in
// front of the instruction's address.
_Noreturn void end_at_exception(Word number, const Word *frame) {
  print((const Byte *)"FAILED: exception ", 18);
  print_number(number);
  print((const Byte *)" at ", 4);
  print_number(frame[number == 8 || (number >= 10 && number <= 14) || number == 17]);
  print((const Byte *)"\n", 1);
  leave(255);
}

static void clear(Word from, Word to) {
  for (volatile Word *at = (Word *)from; at < (Word *)to; ++at) *at = 0;
}

static Word map(Word size) {
  static Word next;
  if (next == 0) next = given->mappings;
  const Word at = next, end = at + ((size + 4095) & ~4095ul);
  if (end > given->end) return -12ul;
  clear(at, end);
  next = end;
  return at;
}

static Word move_heap(Word to) {
  static Word heap;
  if (heap == 0) heap = given->heap;
  if (to < given->heap || to > given->mappings) return heap;
  if (to > heap) clear(heap, to);
  return heap = to;
}

Word answer(Word a, Word b, Word c, Word d, Word number) {
  switch (number) {
    case 1:  // write
      return print((const Byte *)b, c);
    case 20: {  // writev
      Word count = 0;
      for (const Word *part = (const Word *)b; part < (const Word *)b + 2 * c; part += 2) {
        count += print((const Byte *)part[0], part[1]);
      }
      return count;
    }
    case 9:  // mmap, of zeros
      return d & 0x20 ? map(b) : -22ul;
    case 10:  // mprotect
    case 11:  // munmap
      return 0;
    case 12:  // brk
      return move_heap(a);
    case 158:  // arch_prctl
      if (a == 0x1002) {  // where thread-local data lie
        __asm__ volatile("wrmsr" ::"c"(0xc0000100), "a"((unsigned)b), "d"((unsigned)(b >> 32)));
        return 0;
      }
      return a == 0x1023 && b == 18 ? 0 : -22ul;  // to lend tiles
    case 228: {  // clock_gettime: an instruction is a nanosecond
      unsigned low, high;
      __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
      const Word now = (Word)high << 32 | low;
      ((Word *)b)[0] = now / 1000000000;
      ((Word *)b)[1] = now % 1000000000;
      return 0;
    }
    case 231:  // exit_group
      leave((Byte)a);
    case 234:  // tgkill, of itself
      leave(255);
  }
  return -38ul;  // not implemented
}
