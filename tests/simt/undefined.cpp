// What the compiler calls where emulated code would overflow an int, shift too far, divide by zero or leave a local
// array
// (-fsanitize=signed-integer-overflow,shift,bounds,integer-divide-by-zero; without the sanitizer's own runtime, which
// would end the process). The compiler takes these functions not to throw, so a thread that comes here is left for
// good.
#include "simt/machine.h"

namespace {

// Every report begins with the place; the rest is of no use here.
struct Report {
  const char* file;
  uint32_t line, column;
};

void stop(const Report* report, const char* what) {
  const std::string path = report->file;
  ilnas::simt::machine().abandon(std::string(what) + " at " + path.substr(path.find_last_of('/') + 1) + ":" +
                                 std::to_string(report->line));
}

}  // namespace

extern "C" {
void __ubsan_handle_add_overflow(Report* r, void*, void*) { stop(r, "signed overflow in an addition"); }
void __ubsan_handle_sub_overflow(Report* r, void*, void*) { stop(r, "signed overflow in a subtraction"); }
void __ubsan_handle_mul_overflow(Report* r, void*, void*) { stop(r, "signed overflow in a multiplication"); }
void __ubsan_handle_negate_overflow(Report* r, void*) { stop(r, "signed overflow in a negation"); }
void __ubsan_handle_divrem_overflow(Report* r, void*, void*) { stop(r, "division by zero or overflow in a division"); }
void __ubsan_handle_shift_out_of_bounds(Report* r, void*, void*) { stop(r, "shift by too many bits or of a sign"); }
void __ubsan_handle_out_of_bounds(Report* r, void*) { stop(r, "local array out of bounds"); }
}
