/* SPDX-License-Identifier: Apache-2.0 */
/* The whole C interface of libvlmkernels: plain C, no torch, no Python.
 *
 * Every entry point takes device pointers of one GPU, which must be the calling thread's current
 * device, and a stream of that GPU (a cudaStream_t). It launches asynchronously, never
 * synchronises, allocates nothing and can be captured in a CUDA graph. It returns 0, or a
 * cudaError_t whose text vlmk_last_error() gives. Strides count elements, not bytes.
 *
 * A change of any struct or signature raises VLMK_ABI_VERSION, here and in
 * vlmkernels/backends/cuda/_library.py. */
#ifndef VLMKERNELS_H_
#define VLMKERNELS_H_

#include <stdint.h>

#define VLMK_ABI_VERSION 16
#define VLMK_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* The VLMK_ABI_VERSION that the library was built with. */
VLMK_API int vlmk_abi_version(void);

/* What went wrong in the last call of this thread that returned other than 0; valid until its next
 * failing call. */
VLMK_API const char* vlmk_last_error(void);

/* 0 where the GPU driver can run this library, else an error: none there, or one for an older CUDA
 * than the library was built with. Touches no GPU. */
VLMK_API int vlmk_check_driver(void);

/* Queries and keys per tile of vlmk_tile_bounds. */
#define VLMK_TILE 64

/* Query i of batch b sees the keys max(start, 0) <= j < min(stop, num_keys); the range may be
 * empty. M = ceil(num_queries / 64) query tiles, N = ceil(num_keys / 64) key tiles. */
typedef struct {
  const int32_t* start; /* [batch, num_queries], any strides */
  const int32_t* stop;  /* [batch, num_queries], any strides */
  /* [batch, M, 4], 16-byte aligned: lo, hi, full_lo, full_hi. [lo, hi) is the hull of the non-empty
   * ranges of the tile's rows (num_keys, 0 if all are empty), [full_lo, full_hi) what every row
   * sees (num_keys, 0 if nothing). */
  int32_t* q_bounds;
  /* [batch, N, 4], 16-byte aligned: first, last, full_first, full_last. [first, last) spans the
   * query tiles whose hull meets the key tile (M, 0 if none); [full_first, full_last) is the
   * longest run of query tiles all of whose rows see the whole key tile, the first such run on ties
   * (M, 0 if none). */
  int32_t* k_bounds;
  int64_t start_stride_b;
  int64_t start_stride_q;
  int64_t stop_stride_b;
  int64_t stop_stride_q;
  int32_t batch;
  int32_t num_queries; /* at most 2^31 - 65 */
  int32_t num_keys;    /* at most 2^31 - 65 */
} VlmkTileBoundsParams;

VLMK_API int vlmk_tile_bounds(const VlmkTileBoundsParams* params, void* stream);

/* Types of elements. */
#define VLMK_UINT8 0
#define VLMK_FLOAT16 1
#define VLMK_BFLOAT16 2

/* Images of 3 channels in patches of 14 x 14, 16 x 16 or (of 16 bits) 32 x 32 pixels, or rows of
 * pixels that are patches already. Token n of image b, behind the image's num_prefix prefix tokens:
 *   total = sum_k pixel[k] weight[k] + bias + pos
 *   out = norm_weight ? LayerNorm(total) : total
 * The pointers pixels, weight, prefix, pos, out and total and the strides of pixels are multiples
 * of 16 bytes; dim and the strides of pos are multiples of 8. Rows of pixels whose depth is no
 * multiple of 8 begin at multiples of 8 bytes: for these alone there are frames and scratch. */
typedef struct {
  const void* pixels; /* patch (b, gy, gx): columns gx * patch and on, contiguous */
  const void* weight; /* [dim, pixels of a patch] contiguous, in token_type like all that follow */
  const void* bias;   /* [dim] or null */
  const void* prefix; /* [num_prefix, dim] */
  const void* pos;    /* rows of dim, or null; of the patches only unless pos_on_prefix */
  const void* norm_weight; /* [dim] or null */
  const void* norm_bias;   /* [dim] or null */
  void* out;               /* [batch, num_prefix + grid_y * grid_x, dim] contiguous */
  void* total;             /* the same, or null; written only with norm_weight */
  void* scratch;           /* [dim, depth up to a multiple of 64] in token_type */
  int64_t pixel_stride_b;
  int64_t pixel_stride_gy; /* from one row of patches to the next */
  int64_t pixel_stride_c;
  int64_t pixel_stride_y;
  int64_t pos_stride_b;
  int64_t pos_stride_n;
  int32_t batch;
  int32_t grid_y;
  int32_t grid_x;
  int32_t patch;  /* 14, 16, 32; 0: rows, grid_y of them, pixel_stride_gy apart, grid_x being 1 */
  int32_t depth;  /* pixels of a row, in the order of the weight's columns; of rows only */
  int32_t frames; /* of the weight, depth columns for each; they are added up */
  int32_t frame_run; /* so many columns of one frame are followed by those of the next */
  int32_t dim;
  int32_t num_prefix;
  int32_t pos_on_prefix;
  int32_t pixel_type;   /* VLMK_UINT8, or token_type */
  int32_t token_type;   /* VLMK_FLOAT16 or VLMK_BFLOAT16 */
  float pixel_scale[3]; /* uint8: each channel is multiplied as pixel * scale + shift */
  float pixel_shift[3];
  float eps;
} VlmkPatchEmbedParams;

VLMK_API int vlmk_patch_embed(const VlmkPatchEmbedParams* params, void* stream);

/* 0 if vlmk_patch_embed takes these sizes and types, else an error whose text says what it wants.
 * Reads no pointer. */
VLMK_API int vlmk_patch_embed_check(const VlmkPatchEmbedParams* params);

/* The gradients of vlmk_patch_embed for images of 16 bits, given that of out. With x the pixels of
 * a patch, d_total the gradient of total (grad itself without a norm), and sums over images b and
 * patches n:
 *   d_weight = sum_bn d_total[b, n] x[b, n]^T,  d_pos[n] = sum_b d_total[b, n],
 *   d_bias = sum_n d_pos[n]
 * d_prefix is like d_pos. Those but d_weight may be null. Pointers and the strides of pixels are
 * multiples of 16 bytes. Images come in multiples of 32 (patch 16) or 16 (14), or few less. The
 * same bits in every run. */
typedef struct {
  const void* grad;        /* [batch, num_prefix + grid_y * grid_x, dim] contiguous */
  const void* pixels;      /* patch (b, gy, gx) begins at row gy * patch, column gx * patch */
  const void* total;       /* like grad; with a norm only, as are the next four */
  const void* norm_weight; /* [dim], or null without a norm */
  void* d_total;           /* like grad; may be grad */
  void* d_norm_weight;     /* [dim], or null */
  void* d_norm_bias;       /* likewise */
  void* d_weight;          /* [dim, 3 * patch * patch] contiguous */
  void* d_bias;            /* [dim] */
  void* d_prefix;          /* [num_prefix, dim] */
  void* d_pos;             /* [pos_prefix + grid_y * grid_x, dim] contiguous */
  void* workspace;         /* of workspace_bytes; need not be set */
  int64_t pixel_stride_b;
  int64_t pixel_stride_c;
  int64_t pixel_stride_y;
  int64_t workspace_bytes;
  int32_t batch;
  int32_t grid_y;
  int32_t grid_x;
  int32_t patch; /* 14 or 16 */
  int32_t dim;
  int32_t num_prefix;
  int32_t pos_prefix; /* prefix tokens that pos was added to: all or none */
  int32_t type;       /* VLMK_FLOAT16 or VLMK_BFLOAT16, of all of them */
  float eps;
} VlmkPatchEmbedBwdParams;

VLMK_API int vlmk_patch_embed_bwd(const VlmkPatchEmbedBwdParams* params, void* stream);

/* 0 if vlmk_patch_embed_bwd takes these sizes and strides on the current GPU, else an error whose
 * text says what it wants. Sets workspace_bytes and reads no pointer. */
VLMK_API int vlmk_patch_embed_bwd_check(VlmkPatchEmbedBwdParams* params);

/* Softmax attention, out[i] = sum_j softmax_j(scale q[i] . k[j]) v[j], where query i sees the keys
 * max(start, 0) <= j < min(stop, num_keys); all of them without ranges; with causal none behind
 * i + num_keys - num_queries. One that sees no key gives zeros and a log-sum-exp of -inf. Query
 * head h reads key head h / (num_heads / num_kv_heads). Columns are contiguous. q, k, v and out
 * begin at multiples of 16 bytes; strides are positive multiples of 8, but that of a single row,
 * head or image, which does not matter. */
typedef struct {
  const void* q;        /* [batch, num_queries, num_heads, dim] */
  const void* k;        /* [batch, num_keys, num_kv_heads, dim] */
  const void* v;        /* [batch, num_keys, num_kv_heads, value_dim] */
  const int32_t* start; /* [batch or 1, num_queries], rows contiguous; or null */
  const int32_t* stop;
  void* out;        /* [batch, num_queries, num_heads, value_dim] contiguous */
  float* lse;       /* [batch, num_heads, num_queries] contiguous, natural logarithm; or null */
  int32_t* counter; /* one number, for this launch alone: with ranges, causal or softcap. Need not
                       be set */
  int64_t q_stride_b, q_stride_s, q_stride_h;
  int64_t k_stride_b, k_stride_s, k_stride_h;
  int64_t v_stride_b, v_stride_s, v_stride_h;
  int64_t range_stride_b; /* 0 where one mask serves the batch */
  int32_t batch;
  int32_t num_queries;
  int32_t num_keys;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t dim;       /* 8 to 256, a multiple of 8 */
  int32_t value_dim; /* likewise */
  int32_t type;      /* VLMK_FLOAT16 or VLMK_BFLOAT16, of q, k, v and out */
  int32_t causal;
  float scale;   /* positive */
  float softcap; /* if positive, logits become softcap tanh(logit / softcap) */
} VlmkAttentionParams;

VLMK_API int vlmk_attention(const VlmkAttentionParams* params, void* stream);

/* 0 if vlmk_attention takes these sizes, types and strides, else an error whose text says what it
 * wants. Reads no pointer. */
VLMK_API int vlmk_attention_check(const VlmkAttentionParams* params);

/* The gradients of vlmk_attention. With P the weights of the softmax and
 * delta[i] = sum(dout[i] * out[i]) - dlse[i]:
 *   dv = P^T dout,  dS = P * (dout v^T - delta),  dq = scale dS k,  dk = scale dS^T q
 * and with a softcap, dS times 1 - tanh^2(scale q k^T / softcap).
 * A query that sees no key has a gradient of 0, and so has a key that no query sees. dout and out
 * begin at multiples of 16 bytes; strides are as for vlmk_attention, and that of the batch may
 * be 0. */
typedef struct {
  const void* dout;     /* [batch, num_queries, num_heads, value_dim] */
  const void* q;        /* [batch, num_queries, num_heads, dim] */
  const void* k;        /* [batch, num_keys, num_kv_heads, dim] */
  const void* v;        /* [batch, num_keys, num_kv_heads, value_dim] */
  const void* out;      /* [batch, num_queries, num_heads, value_dim] contiguous */
  const float* lse;     /* [batch, num_heads, num_queries] contiguous, natural logarithm */
  const float* dlse;    /* the same, or null */
  const int32_t* start; /* [batch or 1, num_queries], rows contiguous; or null */
  const int32_t* stop;
  void* dq;        /* like q, the heads of a token and the images without gaps; as dk and dv */
  void* dk;        /* like k */
  void* dv;        /* like v */
  void* workspace; /* of workspace_bytes, at a multiple of 16 bytes; need not be set */
  int64_t dout_stride_b, dout_stride_s, dout_stride_h;
  int64_t q_stride_b, q_stride_s, q_stride_h;
  int64_t k_stride_b, k_stride_s, k_stride_h;
  int64_t v_stride_b, v_stride_s, v_stride_h;
  int64_t dq_stride_s, dk_stride_s, dv_stride_s; /* no less than the columns of all heads */
  int64_t range_stride_b;                        /* 0 where one mask serves the batch */
  int64_t workspace_bytes;
  int32_t batch;
  int32_t num_queries;
  int32_t num_keys;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t dim;       /* 8 to 256, a multiple of 8 */
  int32_t value_dim; /* likewise */
  int32_t type;      /* VLMK_FLOAT16 or VLMK_BFLOAT16, of all but lse and dlse */
  int32_t causal;
  int32_t deterministic; /* the same bits in every run, or an error */
  float scale;           /* positive */
  float softcap;         /* as for vlmk_attention */
} VlmkAttentionBwdParams;

VLMK_API int vlmk_attention_bwd(const VlmkAttentionBwdParams* params, void* stream);

/* 0 if vlmk_attention_bwd takes these sizes, types and strides on the current GPU, else an error
 * whose text says what it wants. Sets workspace_bytes and reads no pointer. */
VLMK_API int vlmk_attention_bwd_check(VlmkAttentionBwdParams* params);

/* Rows and columns of a tile of vlmk_clip_loss_* and vlmk_siglip_loss, and how many panels of the
 * gradient of the logits they keep. */
#define VLMK_LOSS_TILE 256

/* Contrastive losses of features a and b, in bfloat16. Row i of a and row j of b have the logit
 * scale * a[i] . b[j] + bias, and belong together where start[i] <= j < stop[i]. The gradient of
 * the logits exists in a few panels at a time. rows, columns and both sizes of a panel are
 * multiples of VLMK_LOSS_TILE, of which only valid_rows and valid_columns are features; results
 * behind those are not defined. Features begin at multiples of 16 bytes, and so do all other
 * pointers to more than one number. The same bits in every run.
 *
 * vlmk_clip_loss_fwd: lse_a and lse_b, of the rows and of the columns, to base e; in totals the sum
 *   of row * lse_a less that of the logits of what belongs together, each times row_positive +
 *   column_positive; and the loss, that and the sum of column * lse_b. Its panels are of all
 *   columns.
 * vlmk_clip_loss_bwd: with g = row exp(logit - lse_a) + column exp(logit - lse_b), less
 *   row_positive + column_positive where they belong together:
 *   da = dloss scale g b,  db = dloss scale g^T a,  and in totals the gradient of scale.
 * vlmk_siglip_loss: the loss, the sum of log(1 + exp(logit)), or of log(1 + exp(-logit)) where they
 *   belong together; and with da, like above and with g its gradient, in totals those of scale and
 *   bias. All are multiplied by weight. */
typedef struct {
  const void* a;        /* [valid_rows, dim], columns contiguous */
  const void* b;        /* [valid_columns, dim], likewise, filled up to a multiple of 8 */
  const float* scale;   /* one number, as are the next two */
  const float* bias;    /* siglip */
  const float* dloss;   /* clip_bwd */
  const int32_t* start; /* [valid_rows] */
  const int32_t* stop;
  const float* row;             /* [valid_rows], clip, as are the next three */
  const float* column;          /* [valid_columns] */
  const float* row_positive;    /* [valid_rows] */
  const float* column_positive; /* [valid_columns] */
  float* lse_a;                 /* [rows], clip; in the backward pass [valid_rows], and read only */
  float* lse_b;                 /* [columns], likewise */
  float* shifted;               /* workspace of clip_bwd: [rows + columns] */
  float* numbers;               /* the same: 4 */
  float* share_a;               /* workspace of clip_fwd: [columns / 256, panel_rows] */
  float* share_b;               /* the same: [panel_rows / 64, columns] */
  void* panel;                  /* workspace of gradients: [kept_panels, panel_rows, panel_columns]
                                   bfloat16 */
  void* low_a;                  /* the same: panel_rows * dim bytes */
  void* low_b;                  /* the same: columns * dim / 2 bytes, none with wide_b */
  int32_t* counters; /* workspace: zeros, 1 (of clip_fwd: of each panel), and with gradients of each
                        panel 2 and (2 panel_rows + columns) dim / 4096 */
  void* da;          /* [rows, dim] contiguous, bfloat16 */
  void* db;          /* [columns, dim] contiguous, bfloat16, with wide_b float */
  double* sums;      /* the same: zeros, [panels of clip_fwd or 1, 3, slots] */
  float* loss;       /* not clip_bwd */
  float* totals;     /* 1, siglip 2 with da */
  int64_t a_stride;
  int64_t b_stride;
  int32_t rows;
  int32_t columns;
  int32_t valid_rows;
  int32_t valid_columns;
  int32_t dim; /* a multiple of 128, from 256 on */
  int32_t panel_rows;
  int32_t panel_columns;
  int32_t kept_panels; /* 2 or more, with gradients */
  int32_t slots;       /* twice the multiprocessors of the GPU */
  int32_t wide_b;
  float weight;
} VlmkContrastiveParams;

VLMK_API int vlmk_clip_loss_fwd(const VlmkContrastiveParams* params, void* stream);
VLMK_API int vlmk_clip_loss_bwd(const VlmkContrastiveParams* params, void* stream);
VLMK_API int vlmk_siglip_loss(const VlmkContrastiveParams* params, void* stream);

/* 0 if these functions take such sizes and strides, else an error whose text says what they want.
 * Reads no pointer. */
VLMK_API int vlmk_contrastive_check(const VlmkContrastiveParams* params);

/* Activations. */
#define VLMK_GELU 0       /* with erf */
#define VLMK_GELU_TANH 1  /* with tanh */
#define VLMK_QUICK_GELU 2 /* x sigmoid(1.702 x) */
#define VLMK_SILU 3       /* x sigmoid(x) */

#define VLMK_ACTIVATED_LINEAR_MIN_DEPTH 512

/* out = activation(x weight^T + bias), or activation(x weight^T) * (x up^T), with products that are
 * rounded before. All pointers are multiples of 16 bytes, all tensors contiguous. */
typedef struct {
  const void* x;      /* [rows, depth] */
  const void* weight; /* [dim, depth] */
  const void* bias;   /* [dim]; NULL with up */
  const void* up;     /* [dim, depth]; NULL with bias */
  void* out;          /* [rows, dim] */
  int32_t rows;
  int32_t depth;      /* a multiple of 8, at least VLMK_ACTIVATED_LINEAR_MIN_DEPTH */
  int32_t dim;        /* a multiple of 8 */
  int32_t activation; /* VLMK_GELU to VLMK_QUICK_GELU; with up VLMK_SILU or VLMK_GELU_TANH */
  int32_t type;       /* VLMK_FLOAT16 or VLMK_BFLOAT16, of all of them */
} VlmkActivatedLinearParams;

VLMK_API int vlmk_activated_linear(const VlmkActivatedLinearParams* params, void* stream);

/* 0 if vlmk_activated_linear takes these sizes and types, else an error whose text says what it
 * wants. Of bias and up it looks at which is NULL, and at nothing else. */
VLMK_API int vlmk_activated_linear_check(const VlmkActivatedLinearParams* params);

/* Rows whose sums a feed-forward's backward pass adds up. */
#define VLMK_FEED_FORWARD_SUM_ROWS 16

/* Two linear layers with an activation between them, in training: what is linear in one tensor is
 * left to others. Forwards before = x weight^T + bias and out = activation(before), of the first
 * layer. Backwards out = (x weight) activation'(before), where x is the gradient of what the second
 * layer gives and weight that layer's; the products are rounded before. All pointers are multiples
 * of 16 bytes, all tensors contiguous. */
typedef struct {
  const void* x;      /* [rows, depth] */
  const void* weight; /* [dim, depth]; backwards [depth, dim] */
  const void* bias;   /* [dim]; backwards not read */
  void* before;       /* [rows, dim]; backwards only read */
  void* turned;       /* [dim, depth], a workspace: backwards weight^T; forwards not touched */
  void* out;          /* [rows, dim] */
  /* [M, dim], M = 16 ceil(rows / 256), or NULL; not touched forwards. Backwards the sums of 16 rows
   * of out each, before they are rounded: those of all are the gradient of the first bias. */
  float* sums;
  int32_t rows;
  int32_t depth;      /* a multiple of 8, at least VLMK_ACTIVATED_LINEAR_MIN_DEPTH */
  int32_t dim;        /* a multiple of 8 */
  int32_t activation; /* VLMK_GELU to VLMK_QUICK_GELU */
  int32_t type;       /* VLMK_FLOAT16 or VLMK_BFLOAT16, of all but sums */
} VlmkFeedForwardParams;

VLMK_API int vlmk_feed_forward_fwd(const VlmkFeedForwardParams* params, void* stream);
VLMK_API int vlmk_feed_forward_bwd(const VlmkFeedForwardParams* params, void* stream);

/* 0 if these functions take such sizes and types, else an error whose text says what they want.
 * Reads no pointer. */
VLMK_API int vlmk_feed_forward_check(const VlmkFeedForwardParams* params);

#ifdef __cplusplus
}
#endif

#endif /* VLMKERNELS_H_ */
