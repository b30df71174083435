// Rows of floats times a matrix of int8, for processors that multiply four bytes at a time (AVX-512 VNNI).
//
// y[u, j] = scale[j] * row_scale[u] * sum over i of w[j, i] * rounded(x[u, i] / row_scale[u]), as `quantized_rows` rounds.
//
// The matrix lies in panels of 16 columns, as it is read: byte 4 c + k of quad q of panel p is 128 + w[16 p + c, 4 q + k].
// The instruction multiplies unsigned bytes by signed ones; the sum of a row times 128 is taken off at the end. What a
// panel lacks of columns, and the last quad of rows, is 128: nothing.

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kColumns = 16, kQuad = 4, kBytes = kColumns * kQuad;
constexpr int64_t kPanelsAtOnce = 4;  // of a thread's turn

#ifdef __AVX512VNNI__
struct Sums {
  __m512i columns = _mm512_setzero_si512();
  void Add(const uint8_t* panel, int32_t quad) {
    columns = _mm512_dpbusd_epi32(columns, _mm512_loadu_si512(panel), _mm512_set1_epi32(quad));
  }
  void Store(int32_t* out) const { _mm512_storeu_si512(out, columns); }
};
#else
struct Sums {
  int32_t columns[kColumns] = {};
  void Add(const uint8_t* panel, int32_t quad) {
    int8_t x[kQuad];
    std::memcpy(x, &quad, kQuad);
    for (int c = 0; c < kColumns; ++c)
      for (int k = 0; k < kQuad; ++k) columns[c] += panel[kQuad * c + k] * x[k];
  }
  void Store(int32_t* out) const { std::memcpy(out, columns, sizeof(columns)); }
};
#endif

// What every thread of a product reads, and how far they are.
struct Product {
  int64_t rows, columns, quads, turns;
  const uint8_t* panels;
  const float* scale;
  float* y;
  std::vector<int32_t> rounded;  // [rows, quads], four int8 in each
  std::vector<float> row_scale;
  std::vector<int32_t> offset;  // what 128 too much of every weight comes to
  std::atomic<int64_t> next{0}, done{0};

  void Round(const float* x, int64_t inner);
  void Work();
  template <int R, int P>
  void Block(int64_t row, int64_t panel);
  template <int P>
  void Panels(int64_t panel);
};

void Product::Round(const float* x, int64_t inner) {
  rounded.resize(rows * quads);
  row_scale.resize(rows);
  offset.resize(rows);
  std::vector<int8_t> of_row(quads * kQuad);
  int8_t* __restrict bytes = of_row.data();
  for (int64_t u = 0; u < rows; ++u, x += inner) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < inner; ++i) {
      const float size = std::fabs(x[i]);
      finite &= size <= FLT_MAX;
      largest = size > largest ? size : largest;
    }
    const float scale = (largest > 1e-30f ? largest : 1e-30f) / 127.0f;
    int32_t sum = 0;
    for (int64_t i = 0; finite && i < inner; ++i) {
      const int32_t value = static_cast<int32_t>(std::nearbyintf(x[i] / scale));
      bytes[i] = static_cast<int8_t>(value);
      sum += value;
    }
    // A row that is not finite has no finite product either.
    row_scale[u] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    offset[u] = 128 * sum;
    std::memcpy(&rounded[u * quads], bytes, of_row.size());
  }
}

// R rows times P panels, whose sums stay in registers.
template <int R, int P>
void Product::Block(int64_t row, int64_t panel) {
  Sums sums[R][P];
  const uint8_t* at = panels + panel * quads * kBytes;
  const int32_t* x = &rounded[row * quads];
  for (int64_t q = 0; q < quads; ++q)
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) sums[r][p].Add(at + (p * quads + q) * kBytes, x[r * quads + q]);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) {
      int32_t total[kColumns];
      sums[r][p].Store(total);
      const int64_t first = (panel + p) * kColumns;
      for (int64_t c = 0; c < kColumns && first + c < columns; ++c)
        y[(row + r) * columns + first + c] =
            static_cast<float>(total[c] - offset[row + r]) * row_scale[row + r] * scale[first + c];
    }
}

template <int P>
void Product::Panels(int64_t panel) {
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8)
    for (int p = 0; p < P; p += (P < 2 ? P : 2)) Block<8, (P < 2 ? P : 2)>(row, panel + p);
  if (row + 4 <= rows) Block<4, P>(row, panel), row += 4;
  if (row + 2 <= rows) Block<2, P>(row, panel), row += 2;
  if (row < rows) Block<1, P>(row, panel);
}

void Product::Work() {
  const int64_t num_panels = (columns + kColumns - 1) / kColumns;
  for (int64_t turn; (turn = next.fetch_add(1)) < turns; done.fetch_add(1)) {
    const int64_t first = turn * kPanelsAtOnce;
    if (first + kPanelsAtOnce <= num_panels)
      Panels<kPanelsAtOnce>(first);
    else
      for (int64_t panel = first; panel < num_panels; ++panel) Panels<1>(panel);
  }
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> panels,
                    ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y) {
  const auto x_dims = x.dimensions(), panel_dims = panels.dimensions(), y_dims = y->dimensions();
  if (x_dims.size() != 2 || panel_dims.size() != 3 || y_dims.size() != 2 || panel_dims[2] != kBytes ||
      panel_dims[1] != (x_dims[1] + kQuad - 1) / kQuad || panel_dims[0] != (y_dims[1] + kColumns - 1) / kColumns ||
      static_cast<int64_t>(scale.element_count()) != y_dims[1] || x_dims[0] != y_dims[0])
    return ffi::Error::InvalidArgument("int8_product: rows, panels, scales and result do not belong together");
  auto product = std::make_shared<Product>();
  product->rows = x_dims[0], product->columns = y_dims[1], product->quads = panel_dims[1];
  product->turns = (panel_dims[0] + kPanelsAtOnce - 1) / kPanelsAtOnce;
  product->panels = panels.typed_data(), product->scale = scale.typed_data(), product->y = y->typed_data();
  product->Round(x.typed_data(), x_dims[1]);
  const int64_t threads = pool.num_threads() < product->turns ? pool.num_threads() : product->turns;
  for (int64_t thread = 1; thread < threads; ++thread) pool.Schedule([product] { product->Work(); });
  product->Work();
  // What is left is in the hands of threads that run: nobody waits for one that has not begun.
  while (product->done.load() < product->turns) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Int8Product, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
