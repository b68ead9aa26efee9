// Limits of a stripe's columns, for every kernel file to compile with its own flags. Internal linkage only: see
// cpu/tables.hpp. The loops over a block of rows are what the compiler turns into vector instructions.
//
//   top[0 … kept][row]   the kept + 1 largest of each row, falling; a column bubbles through them, 64 rows at a time
//   limit[row]           of a retained column top[kept], of another top[kept − 1]

template <typename T>
static void stripe_limits(const T* const* columns, std::size_t m, std::size_t kept, std::size_t n, T* const* limits) {
  // The kept + 1 largest of every row, falling. 17 is more than any pattern needs in registers; more spill.
  T top[33][kRowBlock];
  for (std::size_t start = 0; start < n; start += kRowBlock) {
    for (std::size_t k = 0; k <= kept; ++k) {
      for (std::size_t i = 0; i < kRowBlock; ++i) top[k][i] = 0;
    }
    for (std::size_t c = 0; c < m; ++c) {
      const T* column = columns[c] + start;
      T carried[kRowBlock];
      for (std::size_t i = 0; i < kRowBlock; ++i) carried[i] = column[i];
      for (std::size_t k = 0; k <= kept && k <= c; ++k) {
        for (std::size_t i = 0; i < kRowBlock; ++i) {
          const T high = top[k][i] > carried[i] ? top[k][i] : carried[i];
          carried[i] = top[k][i] > carried[i] ? carried[i] : top[k][i];
          top[k][i] = high;
        }
      }
    }
    for (std::size_t c = 0; c < m; ++c) {
      const T* column = columns[c] + start;
      T* limit = limits[c] + start;
      // A retained column leaves the first that was not retained behind as the N-th of the others.
      for (std::size_t i = 0; i < kRowBlock; ++i) {
        limit[i] = column[i] >= top[kept - 1][i] ? top[kept][i] : top[kept - 1][i];
      }
    }
  }
}
